"""Whether a head fits a target (checkpoints.md E): what does not is refused, naming the tensor or key; what looks wrong is warned of."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from specrt.models.config import ARCHITECTURES, ModelConfig
from specrt.text.tokenizer import Tokenizer
from specrt.weights.head import Head
from specrt.weights.medusa import MedusaHead

_LEAST_COVERAGE = 0.95
# Prose, code, numbers and names: what a draft vocabulary should be able to say.
_PROBE = """The committee met on Tuesday to discuss how the new railway line would change the town. Most of the people who spoke said that it should be built, but a few
asked who would pay for it: "We have been here before," said Mrs. Hughes, 64, who owns the bakery on Station Road.
def mean(values: list[float]) -> float:
    total = sum(values)
    return total / len(values) if values else 0.0
1. Preheat the oven to 180 degrees. 2. Mix 250 g of flour with two eggs, a little salt and 125 ml of milk. 3. Bake for 40 minutes, then let it cool.
In 2019 the company reported revenues of $3.2 billion, up 12.5% from the previous year; analysts had expected less. Why does water boil at a lower temperature in the mountains?"""

_CHAT = [{"role": "user", "content": "Good morning."}, {"role": "assistant", "content": "Good morning!"}, {"role": "user", "content": "What time is it?"}]


def fit(head: Head, target: ModelConfig, target_name: str, tokenizer: Tokenizer | None = None) -> list[str]:
    """Warnings of a head that may draft for the target. ValueError if it cannot. tokenizer: the target's."""
    own = _own_tokenizer(head.path)
    _check_widths(head, target)
    _check_vocabulary(head, target, own is not None and tokenizer is not None and own.fingerprint() == tokenizer.fingerprint())
    boundaries = _check_boundaries(head, target)
    warnings = _verifier(head, target, target_name)
    if head.config.ids_read != "given" and not head.config.final_feature and boundaries[-1] >= target.num_layers - 1:
        warnings.append(f"captures boundary {boundaries[-1]} of a target with {target.num_layers} layers; the last is usually {target.num_layers - 3}, so the ids may be meant "
                        "as another convention counts them (override: eagle_aux_hidden_state_layer_ids)")
    if head.config.form == "SpecForge" and head.config.norm_output:
        warnings.append("norm_output is true: SpecForge heads from before 2026-09-15 were trained without it whatever the config says; if acceptance is low, set norm_output false")
    return warnings + _text(own, tokenizer, head.target_ids())


def fit_medusa(head: MedusaHead, target: ModelConfig, target_name: str, tokenizer: Tokenizer | None = None) -> list[str]:
    """``fit`` of MEDUSA heads."""
    name = head.lm_head(0)
    if head.hidden_size != target.hidden_size:
        raise ValueError(f"head {head.origin!r}: tensor '{name}' has {head.hidden_size} input columns; it must have the target's hidden size, {target.hidden_size}")
    ids = head.target_ids()
    if ids is None and head.draft_vocab_size != target.vocab_size:
        raise ValueError(f"head {head.origin!r}: tensor '{name}' has {head.draft_vocab_size} rows; it must have one for each of the target's {target.vocab_size} tokens, or a token_map")
    if ids is not None and int(ids.max()) >= target.vocab_size:
        raise ValueError(f"head {head.origin!r}: tensor 'token_map' holds token id {int(ids.max())}, the target has {target.vocab_size} tokens")
    other = head.base is not None and _last(head.base) != _last(target_name)
    made = [f"the heads were made for {head.base!r} (base_model_name_or_path), and the target is {target_name!r}"] if other else []
    return made + _text(_own_tokenizer(head.path), tokenizer, ids)


def _own_tokenizer(folder: Path) -> Tokenizer | None:
    """Heads rarely have one: of the target they were trained for."""
    try:
        return Tokenizer.from_folder(folder) if (folder / "tokenizer.json").is_file() else None
    except ValueError:
        return None  # broken, but not needed


def _text(own: Tokenizer | None, tokenizer: Tokenizer | None, ids: Tensor | None) -> list[str]:
    """What the head's tokenizer and draft vocabulary, where it has them, say against the target's tokenizer."""
    found: list[str] = []
    if tokenizer is None:
        return found
    if own is not None and own.fingerprint() != tokenizer.fingerprint():
        found.append("the head comes with another tokenizer than the target's (the token -> id tables differ)")
    elif own is not None and own.has_chat_template and tokenizer.has_chat_template and own.apply_chat_template(_CHAT) != tokenizer.apply_chat_template(_CHAT):
        found.append("the head comes with another chat template than the target's")
    if ids is not None and (covered := _coverage(ids, tokenizer)) < _LEAST_COVERAGE:
        found.append(f"the draft vocabulary of {len(ids)} tokens covers only {covered:.0%} of a probe text; tokens outside it are never drafted")
    return found


def _check_widths(head: Head, target: ModelConfig) -> None:
    c, h, wide = head.config, head.config.layers.hidden_size, target.hidden_size
    if c.final_feature and c.fc_inputs and c.fc_inputs != h + wide:
        name = "input_proj.weight" if c.family == "mtp" else "fc.weight"
        raise ValueError(f"head {head.origin!r}: tensor '{name}' has {c.fc_inputs} input columns; it must have hidden_size {h} + the target's hidden size {wide} = {h + wide}")
    if c.like_eagle3 and c.fc_inputs and c.fc_inputs != c.num_aux * wide:
        raise ValueError(f"head {head.origin!r}: tensor 'fc.weight' has {c.fc_inputs} input columns; it must have {c.num_aux} captured layers x the target's hidden size {wide} "
                         f"= {c.num_aux * wide}")
    if c.like_eagle3 and not c.use_aux and h != wide:
        raise ValueError(f"head {head.origin!r}: use_aux_hidden_state is false, so hidden_size = {h} must be the target's, {wide}")
    shared = [name for name, own in (("embed_tokens.weight", head.own_embedding), ("lm_head.weight", c.own_lm_head or head.tied)) if not own]
    if shared and h != wide:
        raise ValueError(f"head {head.origin!r}: there is no tensor '{shared[0]}', so the target's is used, but hidden_size = {h} and the target's hidden size is {wide}")


def _check_vocabulary(head: Head, target: ModelConfig, same_tokens: bool) -> None:
    ours, theirs = head.config.layers.vocab_size, target.vocab_size
    if ours != theirs and not same_tokens:
        raise ValueError(f"head {head.origin!r}: vocab_size = {ours}, the target has {theirs} tokens; they must be equal (a padded vocabulary is accepted if the head comes with the "
                         "target's tokenizer)")
    ids, own = head.target_ids(), head.config.own_lm_head or head.tied
    last = head.config.draft_vocab_size - 1 if ids is None else int(ids[-1])
    if own and last >= theirs:
        raise ValueError(f"head {head.origin!r}: its last draft token is {last} ({'draft_vocab_size' if ids is None else 'tensor ' + repr('d2t')}), the target has {theirs} tokens")
    mask = head.config.mask_token_id
    if mask is not None and mask >= theirs:
        raise ValueError(f"head {head.origin!r}: mask_token_id = {mask}, the target has {theirs} tokens")


def _check_boundaries(head: Head, target: ModelConfig) -> tuple[int, ...]:
    c, layers = head.config, target.num_layers
    boundaries = c.boundaries(layers)
    if not c.final_feature and len(boundaries) != c.num_aux:
        raise ValueError(f"head {head.origin!r}: num_aux_hidden_states = {c.num_aux}, and there are no eagle_aux_hidden_state_layer_ids that say which; give them in speculative_config")
    if any(not 0 <= j <= layers for j in boundaries):
        raise ValueError(f"head {head.origin!r}: eagle_aux_hidden_state_layer_ids resolve to boundaries {list(boundaries)} ({c.ids_read}); they must be from 0 to the target's {layers} layers")
    if any(b <= a for a, b in zip(boundaries, boundaries[1:])):
        raise ValueError(f"head {head.origin!r}: eagle_aux_hidden_state_layer_ids resolve to boundaries {list(boundaries)} ({c.ids_read}); they must ascend")
    return boundaries


def _verifier(head: Head, target: ModelConfig, target_name: str) -> list[str]:
    c, found = head.config, []
    if c.verifier is not None and _last(c.verifier) != _last(target_name):
        found.append(f"the head was made for {c.verifier!r} (speculators_config.verifier), and the target is {target_name!r}")
    if c.verifier_architectures and ARCHITECTURES[target.architecture] not in c.verifier_architectures:
        found.append(f"the head was made for {', '.join(c.verifier_architectures)} (speculators_config.verifier), and the target is {ARCHITECTURES[target.architecture]}")
    return found


def _last(name: str) -> str:
    """Of a path or a hub name, without its owner."""
    return name.rstrip("/").rsplit("/")[-1].lower()


def _coverage(ids: Tensor, tokenizer: Tokenizer) -> float:
    """The share of a probe text's tokens that the draft vocabulary has."""
    tokens, known = tokenizer.encode(_PROBE, bos=False), set(ids.tolist())
    return sum(token in known for token in tokens) / len(tokens)
