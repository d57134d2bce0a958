"""The fit of scores to votes, against closed forms and a plain reimplementation."""

import math

import pytest
import torch
from scipy.optimize import brentq, minimize

from flowrl.votes.fit import fit_scores


def plain_fit(left, right, preference, prior_std):
    """The same posterior written down once more, sample by sample, and handed to scipy."""
    pictures = left.tolist() + right.tolist()
    size = left.shape[1]
    scales = []
    for d in range(size):
        column = [picture[d] for picture in pictures]
        mean = sum(column) / len(column)
        variance = sum((value - mean) ** 2 for value in column) / len(column)
        scales.append(math.sqrt(variance * size))

    def energy(weights):
        total = sum(w * w for w in weights) / (2 * prior_std**2)
        for a, b, y in zip(left.tolist(), right.tolist(), preference.tolist(), strict=True):
            logit = sum(w * (x - z) / s for w, x, z, s in zip(weights, a, b, scales, strict=True))
            chance = 1 / (1 + math.exp(-logit))
            total -= y * math.log(chance) + (1 - y) * math.log(1 - chance)
        return total

    found = minimize(energy, [0.0] * size, method="BFGS", options={"gtol": 1e-9}).x
    return torch.tensor([w / s for w, s in zip(found, scales, strict=True)])


def test_one_feature_and_one_vote_by_hand():
    """Features 1 and 0, standard deviation 1/2: w / tau^2 = 2 (1 - sigmoid(2 w)), the slope is 2 w,
    and the mean of both pictures has score 0.

    Mutation: a factor 2 in the penalty, no scale, or the score of another picture as 0.
    """
    fit = fit_scores(
        torch.tensor([[1.0]]),
        torch.tensor([[0.0]]),
        torch.tensor([1.0]),
        prior_std=1.5,
        num_first=1,
    )
    weight = brentq(lambda w: w / 1.5**2 - 2 * (1 - 1 / (1 + math.exp(-2 * w))), 0, 10, xtol=1e-14)
    assert fit.slope.tolist() == pytest.approx([2 * weight], rel=1e-9)
    assert fit.offset == pytest.approx(-weight, rel=1e-9)
    scores = fit.scores(torch.tensor([[1.0], [0.0], [0.5]]))
    assert scores.tolist() == pytest.approx([weight, -weight, 0], abs=1e-6)
    assert fit.agreement == 1.0


@pytest.mark.parametrize("prior_std", [0.3, 2.0, 20.0])
def test_it_agrees_with_a_plain_reimplementation(prior_std):
    """Mutation: another prior, another scale, or a vote for neither as one for the right one."""
    generator = torch.Generator().manual_seed(1)
    left = torch.randn(40, 3, generator=generator) * torch.tensor([1.0, 10.0, 0.1])
    right = torch.randn(40, 3, generator=generator) * torch.tensor([1.0, 10.0, 0.1])
    preference = torch.randint(0, 3, (40,), generator=generator) / 2
    fit = fit_scores(left, right, preference, prior_std=prior_std, num_first=5)
    expected = plain_fit(left, right, preference, prior_std)
    torch.testing.assert_close(fit.slope, expected, rtol=1e-5, atol=1e-7)
    beginning = torch.cat([left[:5], right[:5]]).double()
    assert float((beginning @ fit.slope + fit.offset).mean()) == pytest.approx(0, abs=1e-9)
    decided = [row for row in range(40) if preference[row] != 0.5]
    agreed = 0
    for row in decided:
        is_left = float((left[row] - right[row]).double() @ fit.slope) > 0
        agreed += is_left == (float(preference[row]) == 1.0)
    assert fit.agreement == pytest.approx(agreed / len(decided))


def test_the_units_of_a_feature_do_not_matter():
    """Scores are the same for a feature in other units, and for one twice. Mutation: no scale, or
    none by the number of features.
    """
    generator = torch.Generator().manual_seed(2)
    left, right = torch.randn(2, 30, 4, generator=generator, dtype=torch.float64)
    preference = (left[:, 0] > right[:, 0]).double()
    fit = fit_scores(left, right, preference, prior_std=2.0, num_first=30)
    expected = fit.scores(left)

    def changed(features):
        return torch.cat([features * 1000 + 7, features], 1)

    other = fit_scores(changed(left), changed(right), preference, prior_std=2.0, num_first=30)
    torch.testing.assert_close(other.scores(changed(left)), expected, rtol=1e-5, atol=1e-5)


def test_votes_that_nothing_contradicts_stay_finite():
    """Separable votes, of more features than votes, one of them constant. Mutation: no prior, or a
    division by a spread of 0.
    """
    generator = torch.Generator().manual_seed(3)
    left, right = torch.randn(2, 10, 50, generator=generator)
    left[:, 7] = right[:, 7] = 3.0
    fit = fit_scores(left, right, torch.ones(10), prior_std=1e3, num_first=10)
    assert fit.slope.isfinite().all() and fit.slope[7] == 0
    assert fit.agreement == 1.0
    none = fit_scores(left, right, torch.full((10,), 0.5), prior_std=2.0, num_first=10)
    assert math.isnan(none.agreement)
