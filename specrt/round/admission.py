"""What the host writes into a slot's tables when a request enters: one packed copy to the device, then copies on the device.

Nothing here waits for the device: a round may be in flight. Everything is ordered behind it on the stream."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from specrt.round.setup import SlotSetup
from specrt.round.state import STOP_IDS, RoundState


def upload(values: np.ndarray, device: torch.device) -> Tensor:
    """``values`` on the device, the copy only enqueued. The pinned buffer comes from torch's caching allocator, which gives it to nobody before the copy has run."""
    host = torch.from_numpy(values)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def write_slot(s: RoundState, slot: int, setup: SlotSetup) -> None:
    """The slot's tables and history. The slot stays out of rounds until ``RoundState.active`` says otherwise."""
    p, tokens = setup.params, np.array(setup.tokens, dtype=np.int32)
    penalised = p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0
    biased = p.logit_bias is not None or p.allowed_token_ids is not None
    stop_ids = np.full(STOP_IDS, -1, dtype=np.int32)
    stop_ids[: len(setup.stop_ids)] = setup.stop_ids
    parts = {
        "seed": np.array([setup.seed], dtype=np.int64).view(np.int32),  # first: its place is a multiple of 8 bytes
        "sampling_f": np.array([p.temperature, p.top_p, p.min_p, p.repetition_penalty, p.presence_penalty, p.frequency_penalty], dtype=np.float32).view(np.int32),
        "sampling_i": np.array([p.top_k, p.min_tokens, setup.prompt_len, biased, penalised], dtype=np.int32),
        "limit": np.array([setup.longest - 1], dtype=np.int32),  # the last token of all is never committed
        "stop_ids": stop_ids,
        "tokens": tokens,
        "allowed": np.array(list(p.allowed_token_ids or ()), dtype=np.int32),
        "bias_id": np.array(list(p.logit_bias or ()), dtype=np.int32),
        "bias": np.array(list((p.logit_bias or {}).values()), dtype=np.float32).view(np.int32),
    }
    packed = upload(np.concatenate(list(parts.values())), s.device)
    at = dict(zip(parts, packed.split([len(part) for part in parts.values()])))
    s.active[slot].fill_(0)
    s.seq_lens[slot].fill_(0)
    s.seeds[slot : slot + 1].copy_(at["seed"].view(torch.int64))
    s.sampling_f[slot].copy_(at["sampling_f"].view(torch.float32))
    s.sampling_i[slot].copy_(at["sampling_i"])
    s.limit[slot : slot + 1].copy_(at["limit"])
    s.stop_ids[slot].copy_(at["stop_ids"])
    s.history[slot, : len(tokens)].copy_(at["tokens"])
    known = at["tokens"].long()
    s.prompt_mask[slot].zero_().index_fill_(0, known[: setup.prompt_len], 1)
    output = known[setup.prompt_len :]
    s.output_count[slot].zero_().scatter_add_(0, output, torch.ones_like(output, dtype=torch.int32))
    if biased:
        row = s.bias[slot].fill_(0.0 if p.allowed_token_ids is None else float("-inf"))
        row.index_fill_(0, at["allowed"].long(), 0.0).index_add_(0, at["bias_id"].long(), at["bias"].view(torch.float32))
    s.masked[slot].fill_(int(p.token_mask is not None))
    if p.token_mask is not None and s.mask_bits is None:
        s.mask_bits = torch.zeros(s.rows, -(-s.vocab // 32), dtype=torch.int32, device=s.device)


def pack_masks(masks: np.ndarray) -> np.ndarray:
    """bool [nodes, V] -> int32 [nodes, ceil(V / 32)], bit t % 32 of word t / 32 = token t."""
    nodes, vocab = masks.shape
    padded = np.zeros((nodes, -(-vocab // 32) * 32), dtype=bool)
    padded[:, :vocab] = masks
    return np.packbits(padded, axis=1, bitorder="little").view(np.int32)
