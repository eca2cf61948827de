"""From a file's intensities to the [0, 1] that a network sees: the window, fill values, CT that is not in HU."""

import numpy as np

from fmsam_lib.images.files import Source, name_of
from fmsam_lib.records import data_error

CT_WINDOW = (-1000.0, 1000.0)  # HU, as uniGradICON


def window(where: Source, image: np.ndarray, modality: str) -> tuple[float, float]:
    """The intensities that become 0 and 1: of CT -1000 and 1000 HU, of MR its minimum and its 99th percentile.

    An MR image's fill values are left out. Raises DataError for an image that would be constant, and for CT that is
    not in HU.
    """
    low, high = CT_WINDOW
    if modality != "CT":
        inside = without_fill(image)
        low, high = float(inside.min()), float(np.percentile(inside, 99))
    elif image.min() < image.max() and image.max() > low:
        _check_hounsfield(where, image)
    if min(image.max(), high) <= max(image.min(), low):
        what = "in [-1000, 1000] HU" if modality == "CT" else "up to the 99th percentile"
        raise data_error(name_of(where), f"an image that varies {what}", f"{image.min():g} throughout", "Leave it out.")
    return low, high


def without_fill(image: np.ndarray) -> np.ndarray:
    """An MR image's values without what fills its outside: -32768, -1024 and the like; where nothing does, all of it.

    Whole numbers below 0 (z-scores are not), at most three, each of many voxels, the last further from all other values
    than these from each other; where these are not negative, a fifth of that is far enough.
    """
    inside = rest = image
    for _ in range(3):
        low = float(rest.min())
        if low >= 0 or low % 1 or (rest == low).sum() < max(8, image.size / 1000) or low == rest.max():
            break
        rest = rest[rest > low]
        start, end = float(rest.min()), float(np.percentile(rest, 99))
        if 0 < (end - start) * (1.0 if start < 0 else 0.2) < start - low:
            inside = rest
    return inside


def normalise(where: Source, image: np.ndarray, modality: str) -> np.ndarray:
    """Intensities to [0, 1], float32: clipped to their `window`."""
    low, high = window(where, image, modality)
    return ((np.clip(image.astype(np.float32, copy=False), low, high) - low) / (high - low)).astype(np.float32)


def _check_hounsfield(where: Source, image: np.ndarray) -> None:
    """Refuse CT of which the window would make most of the body constant: stored with an offset, scaled, or no CT."""
    low, high = CT_WINDOW
    image = image.ravel()[:: max(1, image.size // 1_000_000)]
    body, deep, dense = image[image > low], image[image < low - 200], image[image > high / 2]
    dark, middle, bright = np.percentile(body if body.size else image, (1, 50, 99))
    below, around = (np.percentile(deep, (25, 50, 75)) if deep.size > 0.01 * image.size else np.zeros(3)), 0.0
    if dense.size > 0.03 * image.size:  # soft tissue stored as about 1064, in much air
        around = ((dense > high - 150) & (dense < high + 200)).mean() * (dark > -50)
    # Air that scatters around -2024; all of one value, it is a scanner's padding.
    air = abs(below[1] - (low - 1024)) < 300 and 0 < below[2] - below[0] < 300
    in_bytes = image.min() >= 0 and image.max() <= 255 and (image.max() >= 200 or (image <= 5).mean() > 0.02)
    if air or (image > low + 100).mean() < 0.01:
        remedy = "They look like HU - 1024: add 1024"
    elif bright - dark < 10 or in_bytes or bright > 5000:
        remedy = "They look scaled: bring them back to HU"
    elif dark > low / 2 and ((body >= high).mean() > 0.15 or around > 0.6):
        remedy = "They look like HU + 1024: subtract 1024"
    else:
        return
    found = f"values with 1st, 50th, 99th percentile {dark:.4g}, {middle:.4g}, {bright:.4g}"
    todo = f"{remedy}, or pass the modality mr, which takes intensities as they come."
    raise data_error(name_of(where), f"CT in HU, air near {low:g}, most of the body below {high:g}", found, todo)
