"""Moments ↔ bytes, exactly, and as few as their own structure allows.

Half of a symmetric matrix travels, and of that what the rest does not tell:

- Class sums predict products: of entry (i, j) goes its distance to
  Σ_c s_ci·s_cj/n_c, whose size is about √(v_i·v_j/n) for features that vary by
  v/n within their class. The diagonal, hence v, goes first.
- With fewer images than features the Gram matrix has a low rank r, and r of its
  rows hold all of it: G = [[A, B], [Bᵀ, BᵀA⁻¹B]]. Rounded to whole numbers the
  last part is exact, which the sender makes sure of and a checksum proves. Rows
  of the Gram matrix are all that goes: no image's features, and nothing that
  the whole matrix would not say.

What a client reveals to a server that reads its moments: how many images of
each class it has, the classes' mean features and how features vary together.
Of a class with a single image the mean *is* that image's rounded features; and
whoever tries hard enough may find the images' features from a Gram matrix of
few images. Sums of whole numbers go well with secure aggregation, which hides a
single client's; this alone does not.
"""

import struct
import zlib

import numpy as np

from fleet.closed_form.integers import Reader, pack, quarter_log2, unpack
from fleet.closed_form.moments import EXPONENTS, MAX_CODE, Moments
from fleet.errors import UpdateError

_VERSION = 1
_HEADER = struct.Struct("<BbI")  # version, exponent, checksum of the Gram matrix


def encode_moments(moments: Moments) -> bytes:
    """Bytes that `decode_moments` turns into the same moments."""
    counts, sums, gram = moments.counts, moments.class_sums, moments.gram
    diagonal = gram.diagonal()
    pivots = _pivots(gram, moments.num_examples)
    there = counts > 0
    rows, columns = _entries(pivots)
    return b"".join(
        [
            _HEADER.pack(_VERSION, moments.exponent, _checksum(gram)),
            np.packbits(pivots).tobytes(),
            _pack_alike(counts),
            _pack_alike(diagonal),
            _pack_alike(sums.sum(axis=0)),
            pack(
                (sums - _expected_sums(sums.sum(axis=0), counts))[there][1:].ravel(),
                _sum_magnitudes(diagonal, counts[there][1:], moments.num_examples).ravel(),
            ),
            pack(
                gram[rows, columns] - _expected_gram(sums, counts)[rows, columns],
                _gram_magnitudes(diagonal, sums, counts)[rows, columns],
            ),
        ]
    )


def decode_moments(
    data: bytes, *, features: int, classes: int, exponent: int, max_examples: int
) -> Moments:
    """Moments that a client may have: of as many images as it says, with codes in range.

    Args:
        data: from `encode_moments`, or from anybody.
        features: D, inputs of the head.
        classes: C.
        exponent: of the step that was agreed on.
        max_examples: images that a client may have.

    Raises:
        UpdateError: if they are not; what is allocated goes by the arguments
            alone, never by the bytes.
    """
    stream = Reader(data)
    version, told, checksum = _HEADER.unpack(stream.take(_HEADER.size))
    if version != _VERSION:
        raise UpdateError(f"moments are of version {version}, expected {_VERSION}; run the same")
    if told != exponent or told not in EXPONENTS:
        raise UpdateError(f"moments are in steps of 2^{told}, the server's are of 2^{exponent}")
    pivots = np.unpackbits(
        np.frombuffer(stream.take((features + 7) // 8), np.uint8), count=features
    ).astype(bool)
    counts = _unpack_alike(stream, classes)
    num_examples = _check_counts(counts, max_examples)
    diagonal = _unpack_alike(stream, features)
    _check_range("squares", diagonal, 0, num_examples * MAX_CODE**2)
    sums = _unpack_sums(stream, diagonal, counts)
    rows, columns = _entries(pivots)
    gram = np.zeros((features, features), np.int64)
    magnitudes = _gram_magnitudes(diagonal, sums, counts)[rows, columns]
    gram[rows, columns] = unpack(stream, magnitudes)
    stream.end()
    gram[rows, columns] += _expected_gram(sums, counts)[rows, columns]
    gram[columns, rows] = gram[rows, columns]
    np.fill_diagonal(gram, diagonal)
    if not pivots.all():
        gram = _completed(gram, pivots, 1 / 2)
    if gram is None or _checksum(gram) != checksum:
        raise UpdateError("moments do not match their checksum; they were changed on the way")
    moments = Moments(gram, sums, counts, exponent)
    _check_possible(moments)
    return moments


def _unpack_sums(stream: Reader, diagonal: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(C, D): all classes but the first that is there; that one is what is left of the total."""
    num_examples, there = int(counts.sum()), np.flatnonzero(counts)
    most = num_examples * MAX_CODE
    totals = _unpack_alike(stream, len(diagonal))
    _check_range("sums", totals, -most, most)
    magnitudes = _sum_magnitudes(diagonal, counts[there[1:]], num_examples)
    sums = np.zeros((len(counts), len(diagonal)), np.int64)
    sums[there[1:]] = unpack(stream, magnitudes.ravel()).reshape(magnitudes.shape)
    _check_range("sums", sums, -2 * most, 2 * most)
    sums[there[1:]] += _expected_sums(totals, counts)[there[1:]]
    sums[there[0]] = totals - sums.sum(axis=0)
    if (np.abs(sums) > counts[:, None] * MAX_CODE).any():
        raise UpdateError("sums of a class exceed what its count of images can have")
    return sums


def _check_counts(counts: np.ndarray, max_examples: int) -> int:
    num_examples = sum(counts.tolist())  # Python's numbers do not overflow
    if (counts < 0).any() or not 1 <= num_examples <= max_examples:
        raise UpdateError(
            f"counts of classes must be from 0 on and 1 to {max_examples} together, got "
            f"{num_examples} with a smallest of {counts.min()}"
        )
    return num_examples


def _check_range(what: str, values: np.ndarray, least: int, most: int) -> None:
    if (values < least).any() or (values > most).any():
        raise UpdateError(
            f"{what} of features are from {values.min()} to {values.max()}, expected {least} to "
            f"{most} for this many images"
        )


def _check_possible(moments: Moments) -> None:
    """Some images must have these moments: no direction varies less than not at all."""
    within = moments.within
    # Rounding in Cholesky's algorithm is far below; one step² is as good as nothing.
    slack = 1.0 + 1e-9 * within.trace()
    try:
        np.linalg.cholesky(within + slack * np.eye(len(within)))
    except np.linalg.LinAlgError as error:
        raise UpdateError(
            "moments are those of no images: features vary by less than nothing within classes"
        ) from error


def _pack_alike(values: np.ndarray) -> bytes:
    """Numbers of about one size, with that size before them."""
    magnitude = int(quarter_log2(np.array([np.abs(values).mean()]))[0])
    return bytes([magnitude]) + pack(values, np.full(len(values), magnitude))


def _unpack_alike(stream: Reader, length: int) -> np.ndarray:
    return unpack(stream, np.full(length, stream.take(1)[0]))


def _expected_sums(totals: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(C, D): the share of each class, were all classes alike."""
    return totals[None] * counts[:, None] // counts.sum()


def _sum_magnitudes(diagonal: np.ndarray, counts: np.ndarray, num_examples: int) -> np.ndarray:
    """A sum of n_c features of variance v/n."""
    variance = quarter_log2(diagonal) - quarter_log2(np.array([num_examples]))
    return (variance[None] + quarter_log2(counts)[:, None]) // 2


def _expected_gram(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(D, D): Σ_c s_ci·s_cj/n_c to a whole number, for i < j.

    Products and sums of whole numbers below 2^53, so any BLAS has the same.
    """
    means, parts = _class_means(sums, counts)
    product = sums[counts > 0].T.astype(np.float64) @ means.astype(np.float64)
    return np.floor(product / parts).astype(np.int64)


def _class_means(sums: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, int]:
    """(C', D) int64 means of the classes that there are, in parts of a step, and how many parts.

    As many as keep Σ_c s_ci·mean_cj below 2^53.
    """
    parts = 2 ** min(12, 30 - int(counts.sum()).bit_length())
    there = counts > 0
    return (2 * parts * sums[there] + counts[there, None]) // (2 * counts[there, None]), parts


def _gram_magnitudes(diagonal: np.ndarray, sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(D, D): √(v_i·v_j/n), with v the part of the diagonal that class sums leave."""
    means, parts = _class_means(sums, counts)
    explained = (sums[counts > 0] * means).sum(axis=0) // parts
    left = quarter_log2(diagonal - explained) - quarter_log2(np.array([counts.sum()])) // 2
    left = left.astype(np.int16)  # D² of these: on a small device every byte of them counts
    return (left[:, None] + left[None]) // 2


def _entries(pivots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of what travels: above the diagonal, in a pivot's row or column."""
    return np.nonzero(np.triu(pivots[:, None] | pivots[None], 1))


def _pivots(gram: np.ndarray, num_examples: int) -> np.ndarray:
    """(D,) bool: rows of which all others follow; all rows where few would not do.

    They come from Cholesky's algorithm with pivoting. Of features that are not
    nearly a combination of those before, the one that varies least is next: its
    products are the smallest, so they take the fewest bytes.
    """
    most = len(gram) // 2  # beyond, there is a quarter to save at most, at growing cost
    everything = np.ones(len(gram), bool)
    if num_examples > most:
        return everything
    squares = np.maximum(gram.diagonal(), 1).astype(np.float64)
    left = gram.diagonal().astype(np.float64)
    factor, pivots = np.zeros((len(gram), most)), np.zeros(len(gram), bool)
    for k in range(most):
        if left.max() < 1e-3:  # of a step²
            break
        worth = np.where(left > 0.05 * squares, left / squares**1.5, -1 / np.maximum(left, 1e-9))
        pivot = int(worth.argmax())
        column = gram[:, pivot] - factor[:, :k] @ factor[pivot, :k]
        factor[:, k] = column / np.sqrt(left[pivot])
        left -= np.square(factor[:, k])
        left[pivot] = 0
        pivots[pivot] = True
    completed = _completed(gram, pivots, 1 / 16)  # far from where another machine may round apart
    return pivots if completed is not None and np.array_equal(completed, gram) else everything


def _completed(gram: np.ndarray, pivots: np.ndarray, slack: float) -> np.ndarray | None:
    """The matrix with the rest made from its pivots' rows.

    None if that is no symmetric matrix, or has a number further than `slack` from a whole one.
    """
    among, beside = gram[np.ix_(pivots, pivots)], gram[np.ix_(pivots, ~pivots)].astype(np.float64)
    try:
        with np.errstate(all="ignore"):
            rest = beside.T @ np.linalg.solve(among.astype(np.float64), beside)
    except np.linalg.LinAlgError:
        return None
    if not (np.abs(rest) < 2**53).all():
        return None
    whole = np.rint(rest)
    if (np.abs(rest - whole) > slack).any() or not np.array_equal(whole, whole.T):
        return None
    completed = gram.copy()
    completed[np.ix_(~pivots, ~pivots)] = whole.astype(np.int64)
    return completed


def _checksum(gram: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(gram, "<i8"))
