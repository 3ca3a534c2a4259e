"""The one config of a run: typed, validated, free of torch and Ray.

Read from a commented YAML file with `load_config`; command-line overrides have the form `train.steps=100` or
`anchors.0.replicas=2`. Every error names the field, the value and the fix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shared.errors import ConfigError
from shared.messages import LatentPositions

Dtype = Literal["float32", "bfloat16", "float64"]
Placement = Literal["ray", "local", "shared_base"]


class Section(BaseModel):
    """Base of all sections: no unknown keys, no changes after construction."""

    model_config = ConfigDict(extra="forbid", frozen=True)


SectionType = TypeVar("SectionType", bound=Section)


class RunConfig(Section):
    """Where a run writes."""

    dir: Path = Field(description="Run folder: resolved config, metrics, checkpoints, evaluation.")


class LoraConfig(Section):
    """LoRA on the linear layers of the generator's language model (Hu et al. 2022)."""

    rank: int = Field(32, ge=1)
    alpha: float = Field(64.0, gt=0, description="The update is scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class GeneratorConfig(Section):
    """The model that looks at the image and writes the latents."""

    model: str = Field(description="Hugging Face folder or hub name.")
    latents: int = Field(16, ge=1, le=1024, description="K, latent vectors per image.")
    dtype: Dtype = Field("float32", description="Of the base weights; adapter masters are always float32.")
    device: str = "auto"
    cpus: int | None = Field(None, ge=1, description="Threads if the device is the CPU; by default torch's own choice.")
    gradient_checkpointing: bool = False
    calibrate_norm: bool = Field(
        True, description="Scale the latents once, before training, to the length of the anchors' visual tokens."
    )
    lora: LoraConfig = LoraConfig()

    @model_validator(mode="after")
    def _no_double(self) -> GeneratorConfig:
        if self.dtype == "float64":
            raise ValueError("generator.dtype: float64 is for tests of anchors; use float32 or bfloat16")
        return self


class AnchorConfig(Section):
    """One frozen reader."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    model: str = Field(description="Hugging Face folder or hub name; unused by shared_base.")
    placement: Placement = "ray"
    replicas: int = Field(1, ge=1, le=256, description="Ray actors that share this anchor's images.")
    weight: float = Field(1.0, gt=0, description="w_r in NLL_multi; weights are normalised by their sum.")
    dtype: Dtype = "float32"
    gpus: float = Field(0.0, ge=0, description="GPUs of each replica; 0 runs on the CPU.")
    cpus: float = Field(1.0, ge=0, description="CPUs of each replica; on the CPU also its number of threads.")

    @model_validator(mode="after")
    def _replicas_need_ray(self) -> AnchorConfig:
        if self.replicas > 1 and self.placement != "ray":
            raise ValueError(
                f"replicas: {self.replicas} with placement {self.placement}; "
                "only placement: ray has replicas, set replicas: 1"
            )
        return self


class TransferConfig(AnchorConfig):
    """A reader of any family and width, for evaluation alone: latents reach it through a closed-form projector."""

    tokens: int = Field(
        ge=1, description="Tokens that stand for an image there; K times a square, best as many as its own."
    )


class PoolConfig(Section):
    """How anchors are called."""

    mode: Literal["fused", "vjp"] = Field("fused", description="fused: one forward per step; vjp: two, per token.")
    latent_positions: LatentPositions = LatentPositions.TEXT
    count_end_of_turn: bool = Field(True, description="Whether the end-of-turn token counts in an answer's NLL.")
    start_timeout_s: float = Field(600.0, gt=0, description="For placement, loading and the handshake together.")
    deadline_s: float = Field(120.0, gt=0, description="For one call, retries and restarts included.")
    retries: int = Field(3, ge=0, le=100, description="Times a call is sent again after its replica died.")
    max_restarts: int = Field(3, ge=0, description="Times Ray restarts each replica's process.")
    wait_for_autoscaler: bool = Field(False, description="Wait for nodes that an autoscaler may add.")
    on_loss: Literal["fail", "drop"] = Field("fail", description="When an anchor is lost for good.")
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    resources: dict[str, float] = Field({}, description="Custom Ray resources that each replica needs.")


class FeatureCacheConfig(Section):
    """Image tokens of the generator's vision tower on disk; any number of runs may share the folder."""

    path: Path
    max_gib: float = Field(gt=0, allow_inf_nan=False, description="Beyond it, what was used longest ago is dropped.")


class CurriculumConfig(Section):
    """From simple questions to complex ones, level by level; trainer/data/curriculum.py has the formula."""

    schedule: Literal["none", "linear", "cosine", "steps"] = Field("none", description="How later levels come in.")
    steps: int = Field(300, ge=1, description="From this training step on everything is asked.")
    order: tuple[tuple[str, ...], ...] = Field(
        (
            ("attribute", "query", "position", "choose", "verify", "simple"),
            ("exist",),
            ("count", "count_simple"),
            ("count_complex", "compare", "compare_integer", "compare_attribute"),
            ("relate", "logical", "complex"),
        ),
        min_length=1,
        description="Kinds of questions by level, simplest first; kinds that it does not name are on the last.",
    )
    difficulty: Path | None = Field(
        None,
        description="Labels of `trainer difficulty` instead of `order`: five levels by the share of wrong answers.",
    )

    @model_validator(mode="after")
    def _each_kind_once(self) -> CurriculumConfig:
        kinds = [kind for level in self.order for kind in level]
        for kind in kinds:
            if kinds.count(kind) > 1:
                raise ValueError(f"order: kind {kind!r} stands there twice; put every kind on one level")
        return self


class OtherSource(Section):
    """A further source of a mixture; the fields are those of `data`."""

    source: str
    path: Path
    options: dict[str, Any] = {}
    train_split: str = "train"
    weight: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="How many of its images are drawn for each one of the main source."
    )


class DataConfig(Section):
    """What is looked at and asked about."""

    source: str = Field("clevr", description="One of `SOURCES` in trainer/data.")
    path: Path = Field(description="Folder in the source's layout; source toy writes it if it is absent.")
    options: dict[str, Any] = Field({}, description="The source's own fields; its file in trainer/data checks them.")
    train_split: str = "train"
    val_split: str = "val"
    test_split: str = "test"
    questions_per_image: int = Field(
        3, ge=1, le=64, description="K_q, drawn without replacement at every step, one of each kind first."
    )
    curriculum: CurriculumConfig = CurriculumConfig()
    others: tuple[OtherSource, ...] = Field((), description="Further training sources; this one has weight 1.")
    held_out_kinds: tuple[str, ...] = Field((), description="Question kinds never trained on.")
    hold_out_question: bool = Field(
        False, description="Keep one question of every image from training: the split TRAIN_SPLIT:held_out_questions."
    )
    drop_shared_images: bool = Field(
        False, description="Drop training images that are, byte for byte, in the validation or test split."
    )
    on_error: Literal["fail", "skip"] = "fail"
    pairing: Literal["matched", "shuffled"] = Field(
        "matched", description="shuffled: the control in which no image keeps its own questions."
    )
    max_images: int | None = Field(None, ge=2, description="Use only the first n images of the training split.")
    feature_cache: FeatureCacheConfig | None = Field(None, description="None: the tower sees every image every time.")
    engine: Literal["local", "ray"] = Field(
        "local", description="What makes images ready: threads of the trainer, or Ray Data on all nodes of the cluster."
    )

    @model_validator(mode="after")
    def _cache_is_local(self) -> DataConfig:
        if self.engine == "ray" and self.feature_cache is not None:
            raise ValueError("engine: ray reads images on other machines, feature_cache on this one; drop one of them")
        return self


class LossConfig(Section):
    """Weights of the loss terms; each rises or falls over `ramp_steps` on a half cosine."""

    nll_start: float = Field(0.1, ge=0)
    nll: float = Field(1.0, gt=0)
    concept: float = Field(0.3, ge=0)
    norm_start: float = Field(0.0, ge=0)
    norm: float = Field(0.1, ge=0)
    ramp_steps: int = Field(200, ge=0)


class TrainConfig(Section):
    """The optimization."""

    steps: int = Field(1000, ge=1)
    seed: int = 0
    batch_images: int = Field(4, ge=1, description="Global batch; every other batch size derives from it.")
    microbatches: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        1, description="Equal parts of the batch whose gradients are summed; auto measures which number is fastest."
    )
    lr_lora: float = Field(5e-5, gt=0, description="For LoRA and the concept head.")
    lr_tokens: float = Field(5e-3, gt=0, description="For the embedding rows of the latent tokens.")
    warmup_steps: int = Field(0, ge=0)
    final_lr_share: float = Field(0.1, ge=0, le=1, description="Each group's cosine ends at this share of its rate.")
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    checkpoint_every: int = Field(200, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    validate_every: int = Field(0, ge=0, description="0: never; the newest checkpoint then counts as the best.")
    validate_images: int = Field(64, ge=1)

    @property
    def fewest_microbatches(self) -> int:
        """The number, or the least that `auto` may take: it tries the whole batch at once, too."""
        return 1 if self.microbatches == "auto" else self.microbatches

    @model_validator(mode="after")
    def _batch_divides(self) -> TrainConfig:
        if self.microbatches != "auto" and self.batch_images % self.microbatches:
            raise ValueError(
                f"microbatches: {self.microbatches} does not divide batch_images: {self.batch_images}; choose a divisor"
            )
        return self


class NormCalibrationConfig(Section):
    """Latents rescaled to the norm of visual input embeddings at inference (GAP); no training."""

    decay: float = Field(0.99, ge=0, lt=1, description="Of the moving average over records; its source gives none.")
    statistic: Literal["mean", "median"] = Field("mean", description="Of the norms of a record's visual embeddings.")
    warmup_records: int = Field(0, ge=0, description="Records that are taken in before any latent is rescaled.")


class EvaluationConfig(Section):
    """What `evaluate` measures."""

    images: int = Field(500, ge=2, description="First n images of the test split.")
    batch_images: int = Field(32, ge=1)
    unseen: tuple[AnchorConfig, ...] = Field((), description="Anchors that training never used.")
    transfer: tuple[TransferConfig, ...] = Field((), description="Readers of other families, for --suite transfer.")
    benchmarks: dict[str, Path] = Field(
        {}, description="Folders of public benchmarks, by name, for --suite benchmarks."
    )
    bootstrap_samples: int = Field(1000, ge=100)
    norm_calibration: NormCalibrationConfig | None = Field(
        None, description="Rescale latents before they are read; {} switches it on with the defaults."
    )


class LoggingConfig(Section):
    """Where metrics go beside metrics.jsonl and the progress bar."""

    tensorboard: bool = True
    wandb: bool = Field(False, description="Weights & Biases, if the package is installed.")


class Config(Section):
    """Everything a run needs."""

    method: str = Field("anchored", description="One of `METHODS` in trainer/methods.")
    options: dict[str, Any] = Field(
        {}, description="The method's own fields; its class in trainer/methods checks them."
    )
    run: RunConfig
    generator: GeneratorConfig
    anchors: tuple[AnchorConfig, ...] = ()
    pool: PoolConfig = PoolConfig()
    data: DataConfig
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _ray_cuts_batches_as_told(self) -> Config:
        if self.data.engine == "ray" and self.train.microbatches == "auto":
            raise ValueError("train.microbatches: auto cannot try cuts out with data.engine: ray; set a number")
        return self

    @model_validator(mode="after")
    def _sections_agree(self) -> Config:
        names = [anchor.name for anchor in (*self.all_anchors, *self.evaluation.transfer)]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"anchors: the name {name!r} is used twice; give every anchor a name of its own")
        if any(a.placement == "shared_base" for a in (*self.evaluation.unseen, *self.evaluation.transfer)):
            raise ValueError("evaluation.unseen: an unseen anchor cannot be shared_base; use ray or local")
        k = self.generator.latents
        for reader in self.evaluation.transfer:
            if reader.tokens % k or math.isqrt(reader.tokens // k) ** 2 != reader.tokens // k:
                raise ValueError(
                    f"evaluation.transfer: {reader.name} has tokens {reader.tokens}, not generator.latents ({k}) times "
                    f"a square; use {k} or {4 * k}"
                )
        if self.pool.latent_positions is LatentPositions.GRID and math.isqrt(k) ** 2 != k:
            raise ValueError(
                f"pool.latent_positions: grid needs a square generator.latents, got {k}; "
                f"use {math.isqrt(k) ** 2} or latent_positions: text"
            )
        return self

    @property
    def all_anchors(self) -> tuple[AnchorConfig, ...]:
        """Anchors of training, then the unseen ones of evaluation."""
        return (*self.anchors, *self.evaluation.unseen)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read, override and validate. Raises ConfigError with one line for each wrong field.

    `base: FILE` in a file, relative to it, takes over everything that the file itself does not say.
    """
    tree = _read_tree(path, ())
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree, str(path))


def _read_tree(path: Path, derived: tuple[Path, ...]) -> dict[str, Any]:
    """A file over its base. derived: the files on the way here, which must not be met again."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such config; the shipped ones lie in deploy/configs") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: the file must hold a mapping with sections such as run, generator, anchors")
    if "base" not in tree:
        return tree
    base = path.parent / str(tree.pop("base"))
    if base.resolve() in derived:
        raise ConfigError(f"{path}: base: {base} leads back to itself; remove one of the links")
    return _merged(_read_tree(base, (*derived, path.resolve())), tree)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Mappings are merged key by key, everything else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(merged.get(key), dict) and isinstance(value, dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def parse_config(tree: Any, source: str) -> Config:
    """Validate a tree of plain values. Raises ConfigError naming field, value and fix."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        items = error.errors()
        # A wrong entry makes pydantic call the list around it too short as well, which would mislead.
        wrong = [item for item in items if not any(_lies_within(other["loc"], item["loc"]) for other in items)]
        raise ConfigError("\n".join(_explain(source, item) for item in wrong)) from error


def parse_section(section: type[SectionType], tree: Any, source: str) -> SectionType:
    """Validate one section of plain values. Raises ConfigError naming field, value and fix."""
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(source, item) for item in error.errors())) from error


def dump_config(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _lies_within(inner: tuple[int | str, ...], outer: tuple[int | str, ...]) -> bool:
    return len(inner) > len(outer) and inner[: len(outer)] == outer


def _explain(source: str, item: Any) -> str:
    field = ".".join(str(part) for part in item["loc"]) or "config"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        return f"{source}: {field}: unknown key (value {item['input']!r}); correct its spelling or remove it"
    if item["type"] == "missing":
        return f"{source}: {field}: required but absent; add it"
    if not item["loc"] or item["type"] == "value_error":
        return f"{source}: {field}: {message}"
    return f"{source}: {field}: {message[0].lower() + message[1:]}, got {item['input']!r}"


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: write it as key=value, for example train.steps=100")
    node: Any = tree
    *parents, leaf = key.split(".")
    try:
        for parent in parents:
            node = node[int(parent)] if isinstance(node, list) else node.setdefault(parent, {})
        if isinstance(node, list):
            node[int(leaf)] = yaml.safe_load(text)
        else:
            node[leaf] = yaml.safe_load(text)
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise ConfigError(f"--set {override}: no field {key}; count list entries from 0") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not valid YAML") from error
