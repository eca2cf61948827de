"""What each notebook takes: one pydantic model each, with default, limits and help beside every field.

`checking.read` makes a model of values. The notebooks' parameter cells repeat the defaults; a test holds both equal.
"""

from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, Field, model_validator

from fmsam_lib.checking import Parameters, each_once, in_project, odd, plain_name

Natural = Annotated[int, Field(ge=0, lt=2**32)]
Count = Annotated[int, Field(ge=1)]
Threads = Annotated[int, Field(lt=1025)]
Several = Annotated[int, Field(ge=2)]
OddPoints = Annotated[int, Field(ge=3), AfterValidator(odd)]
Positive = Annotated[float, Field(gt=0)]
Sigma = Annotated[float, Field(ge=0.5, lt=1000)]
NotNegative = Annotated[float, Field(ge=0)]
Name = Annotated[str, Field(min_length=1), AfterValidator(plain_name)]
T = TypeVar("T")
Distinct = Annotated[list[T], AfterValidator(each_once)]
Some = Annotated[Distinct[T], Field(min_length=1)]
Names = Some[Name]
Side = Annotated[int, Field(ge=16)]
Shape = Annotated[list[Side], Field(min_length=2, max_length=3)]
Channels = Annotated[list[Count], Field(min_length=1)]
Folder = Annotated[str, AfterValidator(in_project)]
MINE = "runs/mine/brain-mr"
Beside = Annotated[Folder, AfterValidator(lambda given, at: given or at.data.get("run") or in_project(f"{MINE}/none"))]

EQUAL_COMPUTE = "adam-2x"  # Adam with twice the steps: the baseline at SAM's cost
Optimizer = Literal["adam", "adam-2x", "sam", "asam", "sam-every", "looksam", "random"]
Similarity = Literal["lncc", "lncc2", "mind"]
Climb = Literal["batch", "part", "layer", "norms"]
Method = Literal["none", "ants-syn", "io", "network", "network+io", "network+ema", "network+tail", "network+bn"]
Corruption = Literal["noise", "bias_field", "gamma", "inversion", "blur", "slices", "misalignment"]

DATA = "folder of data sets; empty: the environment's FMSAM_DATA, else the project's data"
THREADS = "processor threads; another number may change the last bits of a result"


class Start(Parameters):
    """Notebooks 00, 04 and 05: a small network trained before your eyes."""

    domain: Name = Field("brain-mr", description="brain-mr, lung-ct, knee-mr, abdomen-ct or heart-mr")
    shape: Shape = Field([64, 64], description="samples along each axis; three numbers for volumes")
    steps: Count = Field(150, description="training steps")
    rho: NotNegative = Field(0.01, description="SAM's radius; 0 is ordinary training")
    seed: Natural = Field(0, description="of the network's first weights")


class ByHand(Parameters):
    """Notebook 02: a displacement field, optimised for one pair."""

    domain: Name = Field("brain-mr", description="brain-mr, lung-ct, knee-mr, abdomen-ct or heart-mr")
    steps: Count = Field(200, description="of the optimizer, for each registration")
    lmbda: NotNegative = Field(1.0, description="weight of the regulariser")


class Coarse(Parameters):
    """Notebook 03: a small network, level by level, trained with GradICON's penalty and without."""

    domain: Name = Field("brain-mr", description="brain-mr, lung-ct, knee-mr, abdomen-ct or heart-mr")
    steps: Count = Field(250, description="training steps, for each of the two networks")
    lmbda: NotNegative = Field(1.5, description="weight of GradICON's penalty")


class Look(Parameters):
    """Notebook 01: one domain's images."""

    domain: Name = Field("brain-mr", description="a synthetic domain, or a data set's folder such as HippocampusMR")
    shape: Shape = Field([64, 64, 64], description="every image is brought onto a grid of so many samples")
    data: Folder = Field("", description=DATA)
    index: Natural = Field(0, description="which test pair to show")
    pairs: Count = Field(10, description="how many test pairs to measure")


class Train(Parameters):
    """Notebook 10 and `train`: one training."""

    out: Folder = Field(f"{MINE}/sam/seed0", min_length=1, description="folder of this run, seen from the project's")
    train_domain: Name = Field("brain-mr", description="domain to train on; several joined with +")
    subjects: Natural = Field(0, description="train on so many subjects of each domain; 0: on all")
    optimizer: Optimizer = Field("sam", description="adam, adam-2x, sam, asam, sam-every, looksam or random")
    seed: Natural = Field(0, description="of the first weights and the order of the pairs")
    shape: Shape = Field([64, 64], description="samples along each axis")
    data: Folder = Field("", description=DATA)
    weights: str = Field("", description='file to fine-tune, or "2d", "3d", "unigradicon", ...; empty: random weights')
    down: Channels = Field([16, 32, 64], description="channels after each halving; with weights, the file decides")
    up: list[Count] = Field([], description="channels on the way up; empty: as down; with weights, the file decides")
    levels: Count = Field(3, description="resolutions: quarter, half, full; with weights, the file decides")
    last_step: bool = Field(False, description="one more step at full resolution; with weights, the file decides")
    first_stage: Natural = Field(0, description="optimizer steps before the last step is added (uniGradICON: 4 of 5)")
    steps: Count = Field(400, description="optimizer steps")
    batch: Count = Field(2, description="pairs a step")
    accumulate: Count = Field(1, description="compute a batch in so many parts, one after the other, to save memory")
    augment: bool = Field(False, description="uniGradICON's random axis permutations, flips and affine noise")
    contrast: NotNegative = Field(0.0, le=3, description="each image's own brightness curve and bias field")
    validation: Natural = Field(4, description="watch the Dice of so many pairs that are in neither training nor test")
    lr: Positive = Field(0.001, description="learning rate at the start")
    lr_schedule: Literal["cosine", "constant"] = Field("cosine", description="to 0 along half a cosine, or constant")
    clip: NotNegative = Field(0.0, description="longest gradient that may move the weights; 0: any")
    rho: NotNegative = Field(0.01, description="radius of SAM's ball (adam does not use it)")
    rho_schedule: Literal["constant", "lr"] = Field("constant", description="lr: rho falls with the learning rate")
    climb: Climb = Field("batch", description="how sam climbs: batch; part, layer or norms: see docs/sam.md")
    late: NotNegative = Field(0.0, lt=1, description="sam climbs after this share of the steps only")
    every: Count = Field(5, description="sam-every and looksam climb in one step of so many")
    alpha: NotNegative = Field(0.7, description="looksam: how much of the last climb's direction later steps add")
    similarity: Similarity = Field("lncc", description="lncc, lncc2 (inverted contrasts) or mind (two modalities)")
    sigma: Sigma = Field(5.0, description="width of LNCC's window, in samples")
    lmbda: NotNegative = Field(1.5, description="weight of GradICON's penalty")
    joint: bool = Field(True, description="both directions in one batch and in BatchNorm; False: as uniGradICON")
    device: Literal["auto", "cpu", "cuda"] = Field("cpu", description="cpu or cuda; auto: a GPU where there is one")
    precision: Literal["float32", "bf16", "fp16"] = Field("float32", description="what the U-Nets compute in")
    processes: Count = Field(1, description="share each batch among so many processes")
    sync_climb: bool = Field(True, description="processes climb by the whole batch's gradient; False: each by its own")
    save_memory: bool = Field(False, description="compute activations twice rather than keep them: a sixth slower")
    averages: bool = Field(False, description="keep two averages of the weights too, for network+ema and network+tail")
    snapshots: Natural = Field(0, description="keep the weights so many times on the way, evenly, for notebook 35")
    threads: Threads = Field(1, ge=1, description=THREADS)

    @model_validator(mode="after")
    def _fits(self) -> "Train":
        if self.up and len(self.up) != len(self.down):
            raise ValueError(f"expected as many channels up as down, {len(self.down)}, got {len(self.up)}")
        if self.batch % (parts := self.processes * self.accumulate):
            raise ValueError(f"expected batch to be a multiple of processes x accumulate, {parts}, got {self.batch}")
        if self.first_stage and not (self.first_stage < self.steps and (self.last_step or self.weights)):
            got = f"got first_stage {self.first_stage}, steps {self.steps}, last_step {self.last_step}"
            raise ValueError(f"expected first_stage to be below steps, and last_step, which is added after it; {got}")
        if self.optimizer != "sam" and (self.climb != "batch" or self.late):
            raise ValueError(f"expected the optimizer sam with climb or late, got {self.optimizer}")
        if self.climb == "part" and (self.accumulate == 1 or self.processes > 1):
            got = f"got accumulate {self.accumulate}, processes {self.processes}"
            raise ValueError(f"expected accumulate of 2 or more and one process with climb part, {got}")
        if self.averages and self.processes > 1:
            raise ValueError("expected averages in one process, got several: leave it out")
        if self.optimizer == "looksam" and self.processes > 1 and not self.sync_climb:
            raise ValueError("expected sync_climb with looksam in several processes: all need one direction")
        return self

    def loss(self) -> dict[str, Any]:
        """What `losses.objective` takes of it."""
        return self.model_dump(include={"similarity", "sigma", "lmbda"})

    def about(self) -> dict[str, Any]:
        """The columns of tables that say which training a row belongs to."""
        return self.model_dump(include={"train_domain", "optimizer", "seed"})

    @property
    def stages(self) -> tuple[int, int]:
        """Optimizer steps without the last step, and in all: twice as many of both for the baseline at SAM's cost."""
        times = 2 if self.optimizer == EQUAL_COMPUTE else 1
        return times * self.first_stage, times * self.steps

    @property
    def updates(self) -> int:
        return self.stages[1]


class Evaluate(Parameters):
    """Notebook 20: one trained network, or what it is compared with, on every test domain."""

    run: Folder = Field(f"{MINE}/sam/seed0", description="folder of a run of 10_train; empty for none and ants-syn")
    out: Beside = Field("", description="folder for the tables; empty: the run's, else runs/mine/brain-mr/none")
    methods: Some[Method] = Field(["network"], description="network, also +io, +ema, +tail, +bn; io, none, ants-syn")
    test_domains: Names = Field(["brain-mr", "heart-mr"], description="synthetic domains or data sets")
    shape: Shape = Field([64, 64], description="samples along each axis")
    data: Folder = Field("", description=DATA)
    pairs: Count = Field(10, description="measure at most this many test pairs of each domain")
    io: Natural = Field(0, description="network+io: steps of Adam on each pair's own loss")
    io_lr: Positive = Field(0.0003, description="network+io: learning rate of these steps")
    alone_io: Natural = Field(200, description="io: as many steps, of a network that is the identity at first")
    alone_lr: Positive = Field(0.001, description="io: learning rate")
    corruptions: Distinct[Corruption] = Field(list(get_args(Corruption)), description="[] for none")
    corrupted_pairs: Count = Field(5, description="corrupt at most this many test pairs of each domain")
    fields: bool = Field(False, description="keep every displacement field in Learn2Reg's form, in fields/")
    threads: Threads = Field(1, ge=1, description=THREADS)

    @model_validator(mode="after")
    def _fits(self) -> "Evaluate":
        of_a_run = [name for name in self.methods if name not in ("none", "ants-syn")]
        if of_a_run and not self.run:
            raise ValueError(f"expected run, the folder of a training, for the methods {', '.join(of_a_run)}; got none")
        for method, name in (("network+io", "io"), ("io", "alone_io")):
            if method in self.methods and getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1 step with the method {method}, got 0")
        return self


class Landscape(Parameters):
    """Notebook 30: the loss around one trained network."""

    run: Folder = Field(f"{MINE}/sam/seed0", description="folder of a run of 10_train")
    other: Folder = Field("", description="folder of a second run from the same start, to walk to; empty: none")
    out: Beside = Field("", description="folder for both tables; empty: the run's")
    test_domains: Names = Field(["brain-mr", "heart-mr"], description="whose loss, beside that of the training images")
    data: Folder = Field("", description=DATA)
    pairs: Count = Field(4, description="pairs in the batch that the loss is measured on")
    radius: Positive = Field(0.5, description="how far to go; filter, layer: in units of the weights' own norms")
    line_points: OddPoints = Field(21, description="points of a line; odd: the trained weights are one")
    plane_points: OddPoints = Field(11, description="points of a plane's side; odd")
    directions: Count = Field(3, description="lines")
    normalisation: Literal["filter", "layer", "none"] = Field("filter", description="filter, layer or none")
    direction_seed: Natural = Field(0, description="of the random directions: the same for networks to compare")
    measured_on: Distinct[Name] = Field([], description="training and test domains to measure flatness on; empty: all")
    rhos: Some[Positive] = Field([0.003, 0.01, 0.03], description="radii")
    draws: Several = Field(8, description="pairs of random perturbations for the average rise")
    ascent_steps: Natural = Field(5, description="of gradient ascent to the worst weights within rho; 0: none")
    eigenvalues: Natural = Field(1, description="of the Hessian, the largest; 0: none")
    probes: Natural = Field(4, description="random vectors for the Hessian's trace and spectrum; 0: none")
    lanczos_steps: Several = Field(20, description="for the spectrum")
    by_hessian: bool = Field(True, description="draw the plane of the Hessian's two largest eigenvectors, too")
    threads: Threads = Field(1, ge=1, description=THREADS)


class Between(Parameters):
    """Notebook 35: from one solution to the other, and the plane of both and their common start."""

    baseline: Folder = Field(f"{MINE}/adam/seed0", description="folder of a run of 10_train")
    treatment: Folder = Field(f"{MINE}/sam/seed0", description="folder of another one: same domain, seed and loss")
    out: Folder = Field(f"{MINE}/between/seed0", min_length=1, description="folder for between.csv")
    test_domains: Names = Field(["brain-mr", "heart-mr"], description="whose loss, beside that of the training images")
    data: Folder = Field("", description=DATA)
    pairs: Count = Field(4, description="pairs in the batch that the loss is measured on")
    path_points: OddPoints = Field(21, description="from one solution to the other; odd")
    plane_points: OddPoints = Field(15, description="of the plane's sides; odd")
    threads: Threads = Field(1, ge=1, description=THREADS)


class Compare(Parameters):
    """Notebook 40: all runs of a study, side by side."""

    study: Folder = Field("studies/quick.yaml", description="the study's file")
    folder: Folder = Field("runs/quick", description="where its runs are")
    data: Folder = Field("", description=DATA)
    baseline: Name = Field("adam", description="optimizer to compare with")
    treatment: Name = Field("sam", description="optimizer in question")


class Registering(Parameters):
    """How `register` works on a pair; `Register` adds the files."""

    modality: Literal["mr", "ct"] = Field("mr", description="mr or ct: of both images")
    moving_modality: Literal["", "mr", "ct"] = Field("", description="of the moving image, if it is another")
    start: Name = Field("overlay", description="overlay, headers, rigid, affine or a transform's file")
    shape: Annotated[list[Side], Field(max_length=3)] = Field([], description="grid; empty: the network's own")
    io: Natural = Field(0, description="steps of instance optimisation on this pair")
    lr: Positive = Field(2.0e-5, description="learning rate of instance optimisation")
    lmbda: NotNegative = Field(1.5, description="weight of the regulariser in it")
    sigma: Sigma = Field(5.0, description="window of the similarity, samples of the grid")
    similarity: Similarity = Field("lncc", description="what instance optimisation maximises: lncc, lncc2 or mind")
    seed: Natural = Field(0, description="of instance optimisation's random points")
    keep_worse: bool = Field(False, description="keep a registration that makes the images less alike, too")


class Register(Registering):
    """`fmsam-register`: one pair of files."""

    fixed: str = Field("", description="image that stays: NIfTI, NRRD, MetaImage, PNG or a folder of DICOM")
    moving: str = Field("", description="image to be warped onto it")
    labels: str = Field("", description="label image of the moving image, to be warped too")
    fixed_labels: str = Field("", description="label image of the fixed image, for Dice before and after")
    fixed_mask: str = Field("", description="where the fixed image counts, for instance optimisation and the measures")
    moving_mask: str = Field("", description="where the moving image counts")
    weights: str = Field("unigradicon", description="2d, 3d, unigradicon, multigradicon (downloaded) or a file")
    out: str = Field("", description="folder for the results")
    threads: Threads = Field(0, ge=0, description="processor threads; 0: as many as the machine has")


class RegisterYourOwn(Register):
    """Notebook 50: the same, and a pair of its own where no files are given."""

    fixed: str = Field("", description="image that stays; empty: a synthetic pair is made")
    weights: str = Field("3d", description="2d, 3d, unigradicon, multigradicon, a file; empty: learns this pair")
    shape: Shape = Field([64, 64, 64], description="grid that the network works on; 175 each for unigradicon")
    out: Folder = Field("runs/mine/registered", min_length=1, description="folder for the results")
    threads: Threads = Field(1, ge=1, description=THREADS)

    @model_validator(mode="after")
    def _both(self) -> "RegisterYourOwn":
        if bool(self.fixed) != bool(self.moving):
            raise ValueError("expected fixed and moving, or neither for a synthetic pair; got one of them")
        return self


class Fair(Parameters):
    """Notebook 06: Adam and SAM side by side, and a verdict."""

    steps: Count = Field(150, description="training steps of Adam and of SAM")
    seeds: Several = Field(3, description="first weights and order of the pairs; every arm is trained with each")
    rho: Positive = Field(0.01, description="SAM's radius")


class Doubt(Parameters):
    """Notebook 60: registrations that look right, and signs that they are not."""

    steps: Count = Field(250, description="training steps of the network that is put to the test")
    pairs: Count = Field(10, description="brains for the last experiment, each at three distances")
