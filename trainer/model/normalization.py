"""Normalization of each row of numbers. The gradient, by hand, keeps only what went in and two numbers per row."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

RowMeans = Callable[[tf.Tensor], tf.Tensor]


class Passes(NamedTuple):
    """The two passes of a normalization.

    Attributes:
        forward: a function of (x, gamma, *beta) that returns (y, *what the backward pass needs beside x and gamma).
        backward: a function of (x, *what the forward pass kept, gamma, the gradient by y) that returns the gradients by
            x, gamma and beta.
    """

    forward: Callable[..., tuple[tf.Tensor, ...]]
    backward: Callable[..., tuple[tf.Tensor, ...]]


def normalize(passes: Passes, x: tf.Tensor, gamma: tf.Tensor, *beta: tf.Tensor) -> tf.Tensor:
    """Normalizes each row of x, multiplies it by gamma, and adds beta if it is given.

    Args:
        passes: the kind of normalization, from `make_passes`.
        x: float [..., width].
        gamma: [width], of the accumulation dtype.
        beta: [width], of the accumulation dtype.
    """

    @tf.custom_gradient
    def apply(x: tf.Tensor, gamma: tf.Tensor, *beta: tf.Tensor) -> tuple[tf.Tensor, object]:
        y, *kept = passes.forward(x, gamma, *beta)
        return y, lambda upstream: passes.backward(x, *kept, gamma, upstream)[: 2 + len(beta)]

    y: tf.Tensor = apply(x, gamma, *beta)
    return y


def row_means(rows: tf.Tensor) -> tf.Tensor:
    """Returns the mean of each row of float [rows, width], as [rows, 1]."""
    return tf.reduce_mean(rows, axis=-1, keepdims=True)


def layer_norm(
    x: tf.Tensor, gamma: tf.Tensor, *beta: tf.Tensor, epsilon: float, means: RowMeans
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Scales each row to mean 0 and variance 1; returns it with the mean and the inverse of the standard deviation.

    Source: Ba, Kiros and Hinton 2016, equation 4.
    """
    rows = _rows(x, gamma)
    mean = means(rows)
    centered = rows - mean
    inverse = _inverse_root(centered, epsilon, means)
    return _like(x, _scaled(centered * inverse, gamma, *beta)), mean, inverse


def rms_norm(
    x: tf.Tensor, gamma: tf.Tensor, *beta: tf.Tensor, epsilon: float, means: RowMeans
) -> tuple[tf.Tensor, tf.Tensor]:
    """Scales each row to root mean square 1; returns it with the inverse of the root mean square.

    Source: Zhang and Sennrich 2019, equation 4.
    """
    rows = _rows(x, gamma)
    inverse = _inverse_root(rows, epsilon, means)
    return _like(x, _scaled(rows * inverse, gamma, *beta)), inverse


def layer_norm_gradient(
    x: tf.Tensor, mean: tf.Tensor, inverse: tf.Tensor, gamma: tf.Tensor, upstream: tf.Tensor
) -> tuple[tf.Tensor, ...]:
    """Returns the gradients of `layer_norm` by x, gamma and beta."""
    unit, upstream = (_rows(x, gamma) - mean) * inverse, _rows(upstream, gamma)
    d_gamma = upstream * unit
    d_x = (upstream * gamma - _mean_of_scaled(upstream, gamma) - unit * _mean_of_scaled(d_gamma, gamma)) * inverse
    return _like(x, d_x), column_sums(d_gamma), column_sums(upstream)


def rms_norm_gradient(x: tf.Tensor, inverse: tf.Tensor, gamma: tf.Tensor, upstream: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """Returns the gradients of `rms_norm` by x, gamma and beta."""
    unit, upstream = _rows(x, gamma) * inverse, _rows(upstream, gamma)
    d_gamma = upstream * unit
    d_x = (upstream * gamma - unit * _mean_of_scaled(d_gamma, gamma)) * inverse
    return _like(x, d_x), column_sums(d_gamma), column_sums(upstream)


_KINDS: dict[str, tuple[Callable, Callable]] = {
    "layer": (layer_norm, layer_norm_gradient),
    "rms": (rms_norm, rms_norm_gradient),
}


def make_passes(
    kind: str, epsilon: float, means: RowMeans = row_means, wrap: Callable[[Callable], Callable] = lambda pass_: pass_
) -> Passes:
    """Returns the passes of a normalization.

    Args:
        kind: a value of model.norm.
        epsilon: added to the variance, or to the mean square, before its root is taken.
        means: how the mean of each row is computed.
        wrap: applied to both passes.
    """
    forward, backward = _KINDS[kind]
    return Passes(wrap(functools.partial(forward, epsilon=epsilon, means=means)), wrap(backward))


def _rows(x: tf.Tensor, gamma: tf.Tensor) -> tf.Tensor:
    # Widened before it is reshaped: the other way round a TPU's compiler writes 0.2 GB more at GPT-2's size.
    return tf.reshape(tf.cast(x, gamma.dtype), [-1, x.shape[-1]])


def _like(x: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
    return tf.cast(with_axes_of(x, rows), x.dtype)


def with_axes_of(x: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
    """Gives rows [n, width] the leading axes of x [..., any]: [..., width]."""
    known = [-1 if size is None else size for size in x.shape[:-1]]
    if known.count(-1) > 1:
        return tf.reshape(rows, tf.concat([tf.shape(x)[:-1], tf.shape(rows)[1:]], axis=0))
    # A single unknown size follows from the others, without an operation.
    return tf.reshape(rows, [*known, rows.shape[-1]])


def _mean_of_scaled(rows: tf.Tensor, gamma: tf.Tensor) -> tf.Tensor:
    return tf.matmul(rows, gamma[:, tf.newaxis]) / tf.constant(rows.shape[-1], rows.dtype)


def _inverse_root(rows: tf.Tensor, epsilon: float, means: RowMeans) -> tf.Tensor:
    return tf.math.rsqrt(means(tf.square(rows)) + tf.constant(epsilon, rows.dtype))


def _scaled(unit: tf.Tensor, gamma: tf.Tensor, *beta: tf.Tensor) -> tf.Tensor:
    return unit * gamma + beta[0] if beta else unit * gamma


def column_sums(rows: tf.Tensor) -> tf.Tensor:
    """Sums float [rows, width] over its rows, by the gradient of a bias: on a CPU far faster than tf.reduce_sum."""
    return tf.raw_ops.BiasAddGrad(out_backprop=rows)
