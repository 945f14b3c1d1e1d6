"""LoRA: the layers, which modules they wrap, and how they get into a model."""

from __future__ import annotations

from lorikeet.lora.grow import add_tokens, grow_vocabulary, growing
from lorikeet.lora.inject import (
    attach,
    disabled,
    inject,
    layers_around,
    lora_layers,
    lora_parameters,
    remove,
    require_plain,
    wrap,
)
from lorikeet.lora.layer import LoraEmbedding, LoraLayer, LoraLinear
from lorikeet.lora.report import ParameterReport, parameter_report
from lorikeet.lora.targets import (
    Match,
    Target,
    find_targets,
    inventory,
    match_targets,
    out_of_reach,
    scaled_rank,
)
from lorikeet.lora.tokens import (
    TokenEmbedding,
    TokenHead,
    TokenLayer,
    ids_by_table,
    token_layers,
    token_layers_around,
    trained_ids,
)
from lorikeet.lora.vocabulary import (
    NewToken,
    Tables,
    Vocabulary,
    tables,
    unseen_tokens,
    vocabulary,
)
from lorikeet.lora.whole import (
    own_parameters,
    put_whole,
    take_whole,
    trained_copies,
    whole_names,
    whole_parameters,
)

__all__ = [
    "LoraEmbedding",
    "LoraLayer",
    "LoraLinear",
    "Match",
    "NewToken",
    "ParameterReport",
    "Tables",
    "Target",
    "TokenEmbedding",
    "TokenHead",
    "TokenLayer",
    "Vocabulary",
    "add_tokens",
    "attach",
    "disabled",
    "find_targets",
    "grow_vocabulary",
    "growing",
    "ids_by_table",
    "inject",
    "inventory",
    "layers_around",
    "lora_layers",
    "lora_parameters",
    "match_targets",
    "out_of_reach",
    "own_parameters",
    "parameter_report",
    "put_whole",
    "remove",
    "require_plain",
    "scaled_rank",
    "tables",
    "take_whole",
    "token_layers",
    "token_layers_around",
    "trained_copies",
    "trained_ids",
    "unseen_tokens",
    "vocabulary",
    "whole_names",
    "whole_parameters",
    "wrap",
]
