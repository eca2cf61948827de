"""What two images' headers leave in doubt: people hear of it, though SimpleITK has decided."""

import numpy as np
import SimpleITK as sitk  # noqa: N813
from scipy.spatial.transform import Rotation

from fmsam_lib.images.grid import affine, oriented
from fmsam_lib.records import data_error


def doubts(where: tuple[str, str], images: tuple[sitk.Image, sitk.Image]) -> list[str]:
    """What is doubtful about the headers. Raises DataError where only one of them states an orientation."""
    silent = [name for name, image in zip(where, images, strict=True) if not oriented(image)]
    if len(silent) == 1:
        (other,) = {*where} - {*silent} or {*silent}
        expected = f"a header that states the orientation, as {other}'s does"
        todo = "Set it (nibabel: image.set_sform(affine, 1)): guessed, it could mirror the result."
        raise data_error(silent[0], expected, "none", todo)
    said = "the header states no orientation (of NIfTI: qform and sform codes 0): the axes are taken as for ITK, LPS"
    notes = [f"{name}: {said}" for name in silent]
    for name, image in zip(where, images, strict=True):
        if _forms_disagree(image):
            spacing = " x ".join(f"{mm:.3g}" for mm in image.GetSpacing())
            notes.append(f"{name}: qform, sform and pixdim disagree; as for ITK, the spacing is {spacing} mm")
    return notes


def _forms_disagree(image: sitk.Image) -> bool:
    """Whether a NIfTI header says of a volume's place also something else than what SimpleITK made of it."""
    if image.GetDimension() < 3 or not image.HasMetaDataKey("qform_code"):
        return False

    def numbers(*keys: str) -> list[float]:
        return [float(word) for key in keys for word in image.GetMetaData(key).split()]

    unit, places = {1: 1000.0, 3: 0.001}.get(int(image.GetMetaData("xyzt_units")) & 7, 1.0), []  # the rest is time's
    if image.GetMetaData("sform_code") != "0":
        places.append(np.reshape(numbers("srow_x", "srow_y", "srow_z"), (3, 4)))
    if image.GetMetaData("qform_code") != "0":
        vector, last = numbers("quatern_b", "quatern_c", "quatern_d"), -1 if numbers("pixdim[0]")[0] < 0 else 1
        rotation = Rotation.from_quat([*vector, np.sqrt(max(0, 1 - np.square(vector).sum()))]).as_matrix()
        steps = np.multiply(numbers("pixdim[1]", "pixdim[2]", "pixdim[3]"), [1, 1, last])
        places.append(np.column_stack([rotation * steps, numbers("qoffset_x", "qoffset_y", "qoffset_z")]))
    atol = 1e-3 * min(image.GetSpacing())
    return any(not np.allclose(unit * place, affine(image)[:3], rtol=1e-5, atol=atol) for place in places)
