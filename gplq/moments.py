"""Second moments of a layer's inputs, and the regressions that need nothing else."""

import torch
from torch import Tensor


class Moments:
    """Means over rows of the products of inputs x [K] and, if wanted, of what the outputs lack, d [N]; FP64.

    Rows may be weighted.

    Inputs have a one appended, so that biases need no case of their own. The squared error of any correction
    ``x -> [W, b] [x, 1]`` of the outputs follows from these means alone.

    Attributes:
        weight: of all rows that were added, together.
        xx: [K + 1, K + 1], mean of [x, 1] [x, 1]^T.
        dx: [N, K + 1], mean of d [x, 1]^T.
        dd: [N], mean of d squared.
    """

    def __init__(self) -> None:
        self.weight = 0.0
        self.xx = self.dx = self.dd = torch.zeros((), dtype=torch.float64)

    def add(self, x: Tensor, d: Tensor | None = None, weights: Tensor | None = None) -> None:
        """``x``: [rows, K]; ``d``: [rows, N]; ``weights``: [rows], > 0, what each row counts; all 1 if None."""
        w = x.new_ones(len(x), 1) if weights is None else weights.to(x)[:, None]
        weight = float(w.double().sum())
        together = self.weight + weight
        # Products in the inputs' precision, but of what is left when the mean has been taken out: where the mean is
        # large, a covariance would otherwise be the difference of two numbers that agree in all their digits.
        mean = (w * x).sum(0) / weight
        centred = x - mean
        weighted = w * centred
        mean = torch.cat([mean, mean.new_ones(1)]).double()
        centred = torch.cat([centred, centred.new_zeros(len(x), 1)], 1)
        weighted = torch.cat([weighted, weighted.new_zeros(len(x), 1)], 1)
        rest = torch.outer(weighted.double().sum(0), mean)
        xx = (weighted.T @ centred).double() + rest + rest.T + weight * torch.outer(mean, mean)
        self.xx = (self.xx.to(x.device) * self.weight + xx) / together
        if d is not None:
            dx = (d.T @ weighted).double() + torch.outer((w * d).double().sum(0), mean)
            self.dx = (self.dx.to(x.device) * self.weight + dx) / together
            self.dd = (self.dd.to(x.device) * self.weight + (w * d.square()).sum(0).double()) / together
        self.weight = together

    def outputs(self, part: slice) -> "Moments":
        """The same inputs, with some of the outputs only."""
        result = Moments()
        result.weight, result.xx, result.dx, result.dd = self.weight, self.xx, self.dx[part], self.dd[part]
        return result

    def inputs(self, centred: bool) -> Tensor:
        """[K, K]: the mean of x x^T, or the covariance of x, if a bias will absorb what the mean does."""
        mean = self.xx[:-1, -1]
        moment = self.xx[:-1, :-1]
        return moment - torch.outer(mean, mean) if centred else moment.clone()

    def error(self, correction: Tensor | None = None) -> float:
        """Mean over rows of || d - [W, b] [x, 1] ||^2 for a correction [N, K + 1]; without one, of || d ||^2."""
        if correction is None:
            return float(self.dd.sum())
        correction = correction.double()
        # Never below zero but for rounding.
        crossed = (correction * self.dx).sum()
        return max(0.0, float(self.dd.sum() - 2 * crossed + ((correction @ self.xx) * correction).sum()))


def ridge_regression(moments: Moments, strength: float, bias: bool) -> Tensor:
    """The correction [W, b] [N, K + 1], FP64, that minimises || d - W x - b ||^2 + lambda || W ||^2.

    With X and Y - Y_Z for x and d this is Eq 3 of GPLQ: (Y - Y_Z) X^T (X X^T + lambda I)^-1. The bias is not
    penalised, which takes the means out of the regression.

    Args:
        moments: with d.
        strength: lambda, as a share of the mean squared input.
        bias: whether there may be one; its column is zero if not.
    """
    matrix = moments.inputs(centred=bias)
    mean_x, mean_d = moments.xx[:-1, -1], moments.dx[:, -1]
    crossed = moments.dx[:, :-1] - (torch.outer(mean_d, mean_x) if bias else 0)
    diagonal = matrix.diagonal()
    diagonal += strength * diagonal.mean().clamp_min(1e-12)
    weight = torch.cholesky_solve(crossed.T, torch.linalg.cholesky(matrix)).T
    offset = mean_d - weight @ mean_x if bias else torch.zeros_like(mean_d)
    return torch.cat([weight, offset[:, None]], 1)
