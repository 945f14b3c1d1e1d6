"""Every option of Lorikeet, declared once: type, default, bounds and help.

A declaration here is at the same time the key of `run.yaml`, the flag (`--lora.r 8`) and the help
text. `load_config` merges a file and flags, and reports every problem at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from lorikeet.errors import ConfigError
from lorikeet.values import (
    BRANCHES,
    FloatMap,
    IntMap,
    Layers,
    Memory,
    Names,
    ShareOrFile,
    Targets,
    Tokens,
)


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_in_place_of_a_number(cls, value: object, info: ValidationInfo) -> object:
        """YAML reads `yes` and `off` as booleans, and pydantic would read `true` as 1."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if not isinstance(value, bool) or annotation is bool:
            return value
        if value is False and "off" in get_args(annotation):
            return "off"
        raise ValueError(f"expected a value, and {'yes' if value else 'no'} is a switch's")


class ModelConfig(_Section):
    """The base model and the machine that runs it."""

    path: str = Field("", description="model folder, or a hub id such as org/name")
    revision: str | None = Field(None, description="hub revision: branch, tag or commit")
    dtype: Literal["auto", "bf16", "fp32", "fp16"] = Field(
        "auto",
        description="compute type of the weights; auto takes bf16 where the machine multiplies it"
        " natively, else fp32",
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    threads: int | None = Field(
        None,
        ge=1,
        le=1024,  # a pool of very many threads cannot be made, which ends the process
        description="CPU threads, at most 32 a core; all cores if not given",
    )
    fast: Literal["auto", "off"] = Field(
        "auto",
        description="auto runs architectures that Lorikeet has kernels for through them, if a trial"
        " at load agrees with the model; off always takes the model's own forward pass",
    )
    trust_remote_code: bool = Field(False, description="run code that the model repository ships")


class LoraConfig(_Section):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685)."""

    r: int = Field(16, ge=1, description="rank of every update")
    alpha: float = Field(
        16.0,
        gt=0,
        description="the update is scaled by alpha / r (alpha / sqrt(r) with rslora)",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    target_modules: Targets = Field(
        "all-linear",
        description="module names (a,b), a regular expression matched against full names, or"
        " all-linear: every linear layer but the output head",
    )
    exclude_modules: Targets | None = Field(
        None, description="names or a regular expression that are never targets"
    )
    layers: Layers | None = Field(None, description="block numbers to adapt: 0,3 or 2-5")
    rank_pattern: IntMap = Field(
        default_factory=dict, description="rank per module: name or regular expression = rank"
    )
    alpha_pattern: FloatMap = Field(
        default_factory=dict, description="alpha per module: name or regular expression = alpha"
    )
    rslora: bool = Field(False, description="rank-stabilised scaling, alpha / sqrt(r)")
    dora: bool = Field(False, description="train the weights' lengths apart (arXiv:2402.09353)")
    init: Literal["kaiming", "gaussian", "pissa"] = Field(
        "kaiming",
        description="how the factors start: A as kaiming (PEFT's default) or gaussian, B at zero;"
        " or both as the weight's largest singular triplets (pissa, arXiv:2404.02948)",
    )
    modules_to_save: Names | None = Field(None, description="modules that are trained whole (a,b)")
    bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="biases that are trained: none, all, or those of adapted modules"
    )
    trainable_tokens: Tokens | None = Field(
        None, description="token ids whose rows are trained: 5,9 of the embedding, or by module"
    )
    new_tokens: Names | None = Field(
        None, description="texts that become tokens (a,b), with rows of their own that are trained"
    )

    @model_validator(mode="after")
    def _entries_agree(self) -> LoraConfig:
        if self.dora and self.init == "pissa":
            raise ValueError("lora.dora and lora.init pissa cannot be combined; choose one")
        tokens = self.trainable_tokens or []
        for ids in tokens.values() if isinstance(tokens, dict) else [tokens]:
            if len(set(ids)) < len(ids):
                raise ValueError("lora.trainable_tokens names a token twice")
        if len(set(self.new_tokens or ())) < len(self.new_tokens or ()):
            raise ValueError("lora.new_tokens names a text twice")
        if "" in (self.new_tokens or ()):
            raise ValueError("lora.new_tokens holds an empty text")
        return self


class DataConfig(_Section):
    """What is trained on, and how a row becomes tokens."""

    path: str = Field("", description="jsonl, json, csv, parquet or txt file, or a hub data set")
    split: str = Field("train", description="split of a hub data set")
    limit: int | None = Field(None, ge=1, description="use the first N rows only")
    max_length: int = Field(512, ge=8, description="longest example, in tokens")
    template: str = Field(
        "auto",
        description="auto, chat (the tokenizer's), instruction-response, alpaca, or a Jinja file",
    )
    supervise: Literal["all", "last", "everything"] = Field(
        "all",
        description="which tokens count: all completions, the last completion, or everything",
    )
    validation: ShareOrFile = Field(
        0.1, description="share of rows held out (0 for none), or a file of its own"
    )


class TrainConfig(_Section):
    """The training run."""

    method: Literal["lora", "full"] = Field("lora", description="train adapters, or every weight")
    batch_size: int = Field(8, ge=1, description="examples per optimizer step")
    epochs: float = Field(1.0, gt=0, description="passes over the data, if max_steps is not given")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps; overrides epochs")
    learning_rate: float | None = Field(
        None, gt=0, description="peak learning rate; 2e-4 for lora, 2e-5 for full if not given"
    )
    loraplus_lr_ratio: float = Field(
        1.0,
        gt=0,
        description="learning rate of every B over that of A (LoRA+, arXiv:2402.12354, takes 16)",
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="what the learning rate does after warm-up"
    )
    warmup: float = Field(
        0.03, ge=0, description="warm-up: a share of all steps if below 1, else a number of steps"
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay of AdamW")
    max_grad_norm: float = Field(1.0, ge=0, description="gradient clipping; 0 for none")
    seed: int = Field(
        0, ge=0, lt=2**63, description="seeds adapters, data order, split and dropout"
    )
    max_tokens: int = Field(
        4096, ge=8, description="tokens per packed micro-batch; changes memory, not the result"
    )
    max_memory: Memory | None = Field(
        None,
        description="most memory that the process may take, such as 6GB: micro-batches are made"
        " smaller and, if that is not enough, as few blocks as possible computed twice",
    )
    int8: bool = Field(
        False,
        description="multiply the frozen weights in int8 while training (CPUs with VNNI): faster,"
        " at a small loss of precision; evaluation always takes the weights as they are",
    )
    eval_every: int | None = Field(
        None, ge=1, description="steps between evaluations; only before and after if not given"
    )
    save_every: int | None = Field(
        None, ge=1, description="steps between checkpoints; only after the last step if not given"
    )
    keep_last: int = Field(2, ge=1, description="checkpoints kept")
    patience: int | None = Field(
        None,
        ge=1,
        description="stop after this many evaluations without improvement, and keep the best",
    )
    tensorboard: bool = Field(False, description="also write TensorBoard event files")

    @property
    def peak(self) -> float:
        """The peak learning rate, with the default of the method filled in."""
        return self.learning_rate or {"lora": 2e-4, "full": 2e-5}[self.method]


class RunConfig(_Section):
    """A complete run: what `run.yaml` holds and what `config.yaml` in a run folder repeats."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    lora: LoraConfig = Field(default_factory=LoraConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    out: str | None = Field(None, description="folder that the run or the study is written into")

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        if self.train.patience is not None and self.train.eval_every is None:
            raise ValueError(
                "train.patience needs train.eval_every: without evaluations nothing stops"
            )
        if self.train.int8 and self.train.method == "full":
            raise ValueError("train.int8 rounds frozen weights, and full fine-tuning has none")
        if self.train.patience is not None and self.data.validation == 0:
            raise ValueError("train.patience needs validation rows: data.validation is 0")
        return self

    def unused(self) -> list[str]:
        """Options that say something about adapters, given to a run that trains every weight."""
        if self.train.method == "lora":
            return []
        lora = self.lora.model_dump(exclude_defaults=True, exclude={"new_tokens"})
        plus = {"loraplus_lr_ratio"} & set(self.train.model_dump(exclude_defaults=True))
        return [f"lora.{key}" for key in lora] + [f"train.{key}" for key in plus]

    def require(self, *names: str) -> None:
        """Raise if one of these options (`model.path`, ...) was not given."""
        missing = [name for name in names if not _get(self, name)]
        if missing:
            raise ConfigError(
                "these options are needed:",
                [f"{name} (--{SHORT_FOR.get(name, name)})" for name in missing],
            )

    def to_yaml(self) -> str:
        """The complete configuration as YAML, with the options' own names."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


SHORT_FOR = {
    "model.path": "model",
    "model.fast": "fast",
    "data.path": "data",
    "train.method": "method",
    "train.seed": "seed",
    "train.max_memory": "max-memory",
    "out": "out",
}
"""Options with a short flag: `--model M` is `--model.path M`."""

ALIASES = {
    "lora.lora_alpha": "lora.alpha",
    "lora.lora_dropout": "lora.dropout",
    "lora.use_rslora": "lora.rslora",
    "lora.use_dora": "lora.dora",
    "lora.layers_to_transform": "lora.layers",
    "lora.trainable_token_indices": "lora.trainable_tokens",
    "train.lr": "train.learning_rate",
}
"""Names of other tools (PEFT's above all) that are accepted in place of ours."""


def options() -> Iterator[tuple[str, FieldInfo]]:
    """Every option as (`section.key`, its declaration), in the order of declaration."""
    for section, field in RunConfig.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, _Section):
            for key, option in annotation.model_fields.items():
                yield f"{section}.{key}", option
        else:
            yield section, field


def load_config(
    file: str | Path | None = None, overrides: Mapping[str, Any] | None = None
) -> RunConfig:
    """Read a run file and lay flags over it.

    Args:
        file: YAML file with the sections of `RunConfig`, or None.
        overrides: dotted option name (`lora.r`) to value; a string is read as the flag's text.

    Raises:
        ConfigError: the file cannot be read, or options are unknown or out of bounds; every
            problem is listed.
    """
    tree = read_yaml(Path(file)) if file is not None else {}
    for name, value in (overrides or {}).items():
        _put(tree, name, value)
    problems = _normalise(tree)
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        problems += [_describe(item) for item in error.errors()]
        config = RunConfig()
    if problems:
        where = (
            f"in {file} and the flags" if file is not None and overrides else file or "the flags"
        )
        raise ConfigError(f"the options in {where} do not hold:".replace("in in", "in"), problems)
    return config


def read_yaml(file: Path) -> dict[str, Any]:
    """A YAML file's mapping, keys unchecked; one given twice is a `ConfigError`."""
    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except FileNotFoundError:
        raise ConfigError(f"there is no run file {file}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the run file {file}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not valid YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{file} must hold sections (model:, data:, ...), found a {type(tree).__name__}"
        )
    return tree


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key given twice is an error; plain PyYAML would take the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping, refusing a repeated key."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key is a list or a mapping", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _put(tree: dict[str, Any], name: str, value: Any) -> None:
    section, _, key = name.partition(".")
    if not key:
        tree[section] = value
    elif isinstance(tree.setdefault(section, {}), dict):
        tree[section][key] = value


def _get(config: RunConfig, name: str) -> Any:
    section, _, key = name.partition(".")
    value = getattr(config, section)
    return getattr(value, key) if key else value


def _normalise(tree: dict[str, Any]) -> list[str]:
    """Rename aliases in place; take unknown keys out and return a problem for each."""
    known = {name for name, _ in options()}
    problems = []
    for section in list(tree):
        if section in known:
            continue
        if not any(name.startswith(f"{section}.") for name in known):
            sections = {name.split(".")[0] for name in known}
            problems.append(_unknown(str(section), known | sections))
            del tree[section]
        elif tree[section] is None:
            tree[section] = {}
        elif isinstance(tree[section], dict):
            problems += _normalise_section(section, tree[section], known)
    return problems


def _normalise_section(section: str, values: dict[str, Any], known: set[str]) -> list[str]:
    problems = []
    for key in list(values):
        name = f"{section}.{key}"
        if name in ALIASES:
            own = ALIASES[name].split(".")[1]
            if own in values:
                problems.append(f"{name} and {ALIASES[name]} are the same option: give one of them")
                del values[key]
            else:
                values[own] = values.pop(key)
        elif name not in known:
            problems.append(_unknown(name, known | set(ALIASES)))
            del values[key]
    return problems


def _unknown(name: str, known: set[str]) -> str:
    return f"unknown option {name}{suggest(name, known)}"


def suggest(name: str, known: set[str]) -> str:
    """`; did you mean X?` for the nearest known name, or nothing."""
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    if not near:  # the right key under the wrong section
        near = [option for option in sorted(known) if option.split(".")[-1] == name.split(".")[-1]]
    return f"; did you mean {near[0]}?" if near else ""


def _describe(item: Any) -> str:
    name = ".".join(str(part) for part in item["loc"] if part not in BRANCHES)
    found = item.get("input")
    message = str(item["msg"]).removeprefix("Value error, ")
    return f"{name}: {message} (found {found!r})" if name else message
