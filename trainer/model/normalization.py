"""Normalization of each row of numbers, with a gradient by hand that keeps what went in, and two numbers a row."""

import tensorflow as tf

from trainer.model.cpu import in_one_pass, mean_of_rows

NORM_EPSILON = 1e-5


@tf.custom_gradient
def normalize(x: tf.Tensor, gamma: tf.Tensor, *beta: tf.Tensor) -> tuple[tf.Tensor, object]:
    """Scales each row to mean 0 and variance 1, then by gamma, and adds beta where there is one.

    Args:
        x: float [..., width].
        gamma: [width], of the accumulation dtype.
        beta: [width], likewise.

    Source: Ba, Kiros and Hinton 2016, equation 4.
    """
    y, mean, inverse = _normalized(x, gamma, *beta)
    return y, lambda upstream: _gradient(x, mean, inverse, gamma, upstream)[: 2 + len(beta)]


@tf.custom_gradient
def normalize_rms(x: tf.Tensor, gamma: tf.Tensor, *beta: tf.Tensor) -> tuple[tf.Tensor, object]:
    """Scales each row to root mean square 1; all else as `normalize`.

    Source: Zhang and Sennrich 2019, equation 4.
    """
    y, inverse = _normalized_rms(x, gamma, *beta)
    return y, lambda upstream: _gradient_rms(x, inverse, gamma, upstream)[: 2 + len(beta)]


@in_one_pass
def _normalized(x: tf.Tensor, gamma: tf.Tensor, *beta: tf.Tensor) -> tuple[tf.Tensor, ...]:
    rows = _rows(x, gamma)
    mean = mean_of_rows(rows)
    centered = rows - mean
    inverse = _inverse_root(centered)
    return _like(x, _scaled(centered * inverse, gamma, *beta)), mean, inverse


@in_one_pass
def _normalized_rms(x: tf.Tensor, gamma: tf.Tensor, *beta: tf.Tensor) -> tuple[tf.Tensor, ...]:
    rows = _rows(x, gamma)
    inverse = _inverse_root(rows)
    return _like(x, _scaled(rows * inverse, gamma, *beta)), inverse


@in_one_pass
def _gradient(
    x: tf.Tensor, mean: tf.Tensor, inverse: tf.Tensor, gamma: tf.Tensor, upstream: tf.Tensor
) -> tuple[tf.Tensor, ...]:
    unit, upstream = (_rows(x, gamma) - mean) * inverse, _rows(upstream, gamma)
    d_gamma = upstream * unit
    d_x = (upstream * gamma - _mean_of_scaled(upstream, gamma) - unit * _mean_of_scaled(d_gamma, gamma)) * inverse
    return _like(x, d_x), column_sums(d_gamma), column_sums(upstream)


@in_one_pass
def _gradient_rms(x: tf.Tensor, inverse: tf.Tensor, gamma: tf.Tensor, upstream: tf.Tensor) -> tuple[tf.Tensor, ...]:
    unit, upstream = _rows(x, gamma) * inverse, _rows(upstream, gamma)
    d_gamma = upstream * unit
    d_x = (upstream * gamma - unit * _mean_of_scaled(d_gamma, gamma)) * inverse
    return _like(x, d_x), column_sums(d_gamma), column_sums(upstream)


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
    # One that is not known follows from the others, without an operation.
    return tf.reshape(rows, [*known, rows.shape[-1]])


def _mean_of_scaled(rows: tf.Tensor, gamma: tf.Tensor) -> tf.Tensor:
    return tf.matmul(rows, gamma[:, tf.newaxis]) / tf.constant(rows.shape[-1], rows.dtype)


def _inverse_root(rows: tf.Tensor) -> tf.Tensor:
    return tf.math.rsqrt(mean_of_rows(tf.square(rows)) + tf.constant(NORM_EPSILON, rows.dtype))


def _scaled(unit: tf.Tensor, gamma: tf.Tensor, *beta: tf.Tensor) -> tf.Tensor:
    return unit * gamma + beta[0] if beta else unit * gamma


def column_sums(rows: tf.Tensor) -> tf.Tensor:
    """Sums float [rows, width] over its rows: by the gradient of a bias, on a CPU far faster than tf.reduce_sum."""
    return tf.raw_ops.BiasAddGrad(out_backprop=rows)
