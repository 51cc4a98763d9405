"""Each loss against a slow, obvious version of itself."""

import math

import pytest
import torch

from dacc.prune.recovery.losses import feature_loss, output_loss


def relative(ours, theirs):
    wrong = power = 0.0
    for one, other in zip(ours, theirs, strict=True):
        wrong, power = wrong + (one - other) ** 2, power + other**2
    return wrong / power


def test_output_loss_is_relative():
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    slow = relative(student.flatten().tolist(), teacher.flatten().tolist())
    assert float(output_loss(student, teacher)) == pytest.approx(slow, rel=1e-5)
    assert float(output_loss(10 * student, 10 * teacher)) == pytest.approx(slow, rel=1e-5)


def usual(values):
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return [abs(value - mean) <= 2 * deviation for value in values]


def test_tokens_far_from_the_mean_in_either_network_are_left_out():
    student, teacher = torch.randn(2, 5, 6), torch.randn(2, 5, 6)
    student[0, 0, 0], teacher[1, 1, 1] = 30.0, -40.0
    ours, theirs = student.flatten().tolist(), teacher.flatten().tolist()
    kept = [one and other for one, other in zip(usual(ours), usual(theirs), strict=True)]
    assert not all(kept)
    slow = relative(*([value for value, keep in zip(each, kept, strict=True) if keep] for each in (ours, theirs)))
    assert float(feature_loss([(student,)], [(teacher,)], 2.0)) == pytest.approx(slow, rel=1e-5)
    assert float(feature_loss([(student,)], [(teacher,)], 0.0)) == pytest.approx(relative(ours, theirs), rel=1e-5)


def test_feature_maps_are_not_masked():
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    student[0, 0, 0, 0] = 50.0
    slow = relative(student.flatten().tolist(), teacher.flatten().tolist())
    assert float(feature_loss([(student,)], [(teacher,)], 2.0)) == pytest.approx(slow, rel=1e-5)


def test_taps_and_streams_count_alike():
    features = [(torch.ones(1, 2, 2, 2), torch.ones(1, 3, 2, 2)), (torch.ones(4, 4),)]
    student = [(2 * features[0][0], features[0][1]), (3 * features[1][0],)]  # errors 1, 0 and 4
    assert float(feature_loss(student, features, 2.0)) == pytest.approx((0.5 + 4) / 2)
