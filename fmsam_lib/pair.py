"""A pair of images: what every room passes to the next."""

from dataclasses import dataclass, field

from torch import Tensor

from fmsam_lib.records import DataError


@dataclass(frozen=True, eq=False)
class Pair:
    """A moving and a fixed image of one grid, and what is known about them.

    moving, fixed: `(1, *S)` float32 in [0, 1].
    moving_label, fixed_label: `(1, *S)` integers, 0 is background; None where there are no labels.
    labels: the structures' names by number, without the background.
    moving_mask, fixed_mask: `(1, *S)` bool, where the similarity counts and the fixed one's regularity is measured.
    true_map: `(D, *S)`, where a point of the fixed grid lies in the moving image, unit coordinates.
    moving_landmarks, fixed_landmarks: `(L, D)` corresponding points, unit coordinates.
    affine: `(4, 4)` of the fixed grid, index to mm (RAS), None where nobody knows it; spacing: mm per sample, by axis.
    moving_spacing: the same of the moving image, whose samples may be others; () where it is the fixed one's.
    unit: of the spacing: "voxel" (of the file) where its millimetres are not known.
    subjects: whose images they are, the fixed one's and the moving one's; () where it is not known.
    title: what people call it, where that is not the name.
    """

    name: str
    moving: Tensor
    fixed: Tensor
    moving_label: Tensor | None = None
    fixed_label: Tensor | None = None
    labels: dict[int, str] = field(default_factory=dict)
    spacing: tuple[float, ...] = ()
    affine: Tensor | None = None
    true_map: Tensor | None = None
    moving_landmarks: Tensor | None = None
    fixed_landmarks: Tensor | None = None
    unit: str = "mm"
    subjects: tuple[str, ...] = ()
    moving_mask: Tensor | None = None
    fixed_mask: Tensor | None = None
    moving_spacing: tuple[float, ...] = ()
    title: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", self.title or self.name)
        for image in (self.moving, self.fixed):
            low, high = (float(end) for end in image.detach().aminmax())
            if low < -0.01 or high > 1.01:  # a network would give some map for any values
                raise DataError(f"{self.name}: expected images in [0, 1], got {low:.4g} to {high:.4g}: scale them")
