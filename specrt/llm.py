"""LLM: the object users hold. Loads a model and its drafters, and generates."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from specrt.checks import boolean
from specrt.config import EngineConfig
from specrt.engine.engine import Engine
from specrt.engine.output import RequestOutput, StreamPiece
from specrt.engine.prompts import params_list, prompt_list, prompt_tokens
from specrt.engine.request import Request
from specrt.engine.seeds import draw_seed, sample_seed
from specrt.engine.turns import Turns
from specrt.sampling_params import SamplingParams

_CUDA_SHARE = 0.85  # of the memory that is free once the weights are in; the rest is for the round's buffers


class LLM:
    """A language model with speculative decoding. Use from any number of threads; requests of all calls share the batch. Not from a token_mask of its own: RuntimeError.

    model: a Hugging Face folder, a .safetensors or .gguf file, a hub name, or "smollm2-135m" (embedded). device: None = CUDA if there is one. dtype:
    "bfloat16" or "float32". quantization: None (weights as stored, FP8 ones too), or "fp8": the matrices of a checkpoint that has none are quantised at load to e4m3,
    a scale for each output channel, lm_head apart; activations by row and 128 channels. kv_cache_dtype: "auto" (keys and values in ``dtype``), or "fp8": in e4m3, a drafter's
    too, with the checkpoint's k_scale and v_scale of each layer, or 1. max_batch_size: requests decoded together, others wait. max_model_len: most tokens of prompt and output; None = the
    model's, at most 8192. kv_cache_memory: bytes for keys and values (drafter's included); None = all that the batch can use (on CUDA at most 85 % of
    what is free, on the CPU an error if there is less). page_size: positions a KV page. speculative_config: None, or a dict as in the README, for example {"method": "ngram"}.
    ValueError names a key that is not valid, and what would be."""

    def __init__(self, model: str | Path, *, device: str | None = None, dtype: str = "bfloat16", quantization: str | None = None, kv_cache_dtype: str = "auto",
                 max_batch_size: int = 8, max_model_len: int | None = None, kv_cache_memory: int | None = None, page_size: int = 64, enforce_eager: bool = False,
                 speculative_config: dict[str, Any] | None = None):
        config = EngineConfig.parse(
            device=device, dtype=dtype, quantization=quantization, kv_cache_dtype=kv_cache_dtype, max_batch_size=max_batch_size, max_model_len=max_model_len,
            kv_cache_memory=kv_cache_memory, page_size=page_size, enforce_eager=enforce_eager, speculative_config=speculative_config, target=str(model))
        self._turns = Turns()
        self._streams: dict[Request, deque[StreamPiece]] = {}  # pieces not fetched yet
        self._dropped: deque[Request] = deque()  # requests of streams that have ended, or were collected without close()
        self._engine: Engine | None = load_engine(model, config)
        self.config = self._engine.config
        self.tokenizer = self._engine.tokenizer

    def generate(self, prompts: Any, params: SamplingParams | list[SamplingParams] | None = None, chat: bool = False) -> list[RequestOutput]:
        """One output a prompt, in order. prompts: a string, a list of token ids, or a list of either; with ``chat`` a message list or a list of
        them. Nothing starts if anything of the call is not valid (ValueError)."""
        given = self._prepare(prompts, params, chat)
        requests = [request for samples in given for request in samples]
        self._turns.visit(lambda: self._add(requests))
        try:
            # The latest is asked first: it ends last, mostly.
            self._turns.until(lambda: all(request.finish_reason is not None for request in reversed(requests)), self._step)
        finally:
            if any(request.finish_reason is None for request in requests):
                self._turns.visit(lambda: self._forget(requests))
        return [_joined([request.to_output() for request in samples]) for samples in given]

    def stream(self, prompt: Any, params: SamplingParams | None = None, chat: bool = False) -> Stream:
        """An iterator over what each round adds to one answer. Closing it early frees the request; several may be open at once. prompt: one of ``generate``'s."""
        given = self._prepare(prompt, params, chat)
        if len(given) != 1 or len(given[0]) != 1:
            raise ValueError(f"stream takes one prompt and n = 1, got {len(given)} prompts and n = {len(given[0])}; open a stream for each")
        stream = Stream(self, given[0][0])
        self._turns.visit(lambda: self._add([stream.request], stream.pieces))
        return stream

    def metrics(self) -> dict[str, Any]:
        """Counters since the start under their metric names ("specrt:spec_decode_num_drafts_total", ...); labelled ones are dicts {label: value}."""
        return self._turns.visit(lambda: self._open().metrics())

    def close(self) -> None:
        """Ends what is running and frees the model and its KV cache. May be called twice."""
        self._turns.visit(self._shut)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _open(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("this LLM is closed")
        return self._engine

    def _prepare(self, prompts: Any, params: Any, chat: bool) -> list[list[Request]]:
        """For each prompt its n requests, all checked."""
        engine = self._open()
        entries = prompt_list(prompts, boolean("chat", chat))
        given = []
        for i, (entry, p) in enumerate(zip(entries, params_list(params, len(entries)))):
            try:
                tokens = prompt_tokens(entry, chat, engine.tokenizer)
                seed = draw_seed() if p.seed is None else p.seed
                given.append([engine.prepare(tokens, p, sample_seed(seed, k)) for k in range(p.n)])
            except ValueError as error:
                raise (error if len(entries) == 1 else ValueError(f"prompts[{i}]: {error}")) from None
        return given

    # What follows runs in turn.

    def _add(self, requests: list[Request], pieces: deque[StreamPiece] | None = None) -> None:
        engine = self._open()
        for request in requests:
            engine.add(request)
            if pieces is not None:
                self._streams[request] = pieces

    def _step(self) -> None:
        """One step of the engine, for everyone."""
        engine = self._open()
        while self._dropped:
            self._forget([self._dropped.popleft()])
        for request, piece in engine.step():
            if request in self._streams:
                self._streams[request].append(piece)

    def _forget(self, requests: list[Request]) -> None:
        for request in requests:
            self._streams.pop(request, None)
            if self._engine is not None:
                self._engine.abort(request)

    def _shut(self) -> None:
        self._engine = None
        self._streams.clear()


class Stream:
    """Pieces of one answer as rounds end. Iterate it; ``close`` (or leaving its ``with``) frees the request. For one thread at a time. ``output``: the whole answer, once it has ended."""

    def __init__(self, llm: LLM, request: Request):
        self._llm, self.request = llm, request
        self.pieces: deque[StreamPiece] = deque()
        self.output: RequestOutput | None = None
        self._closed = False

    def __iter__(self) -> Iterator[StreamPiece]:
        return self

    def __next__(self) -> StreamPiece:
        if self._closed:
            raise StopIteration
        try:
            if not self.pieces:
                self._llm._turns.until(lambda: bool(self.pieces) or self.request.finish_reason is not None, self._llm._step)
            if not self.pieces:  # another call's step failed and ended this request with it
                self.pieces.append(StreamPiece("", [], [], self.request.finish_reason, self.request.error, self.request.to_output()))
            piece = self.pieces.popleft()
        except BaseException:
            self.close()
            raise
        if piece.finish_reason is not None:
            self.output = piece.output
            self.close()
        return piece

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            if self.request.finish_reason is not None or self._llm._turns.mine:  # nothing to free, or not now
                self._llm._dropped.append(self.request)
            else:
                self._llm._turns.visit(lambda: self._llm._forget([self.request]))

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __del__(self) -> None:
        # The collector may run in the middle of a step: only leave a note (close() waits for a turn).
        if not getattr(self, "_closed", True):
            self._llm._dropped.append(self.request)


def _joined(samples: list[RequestOutput]) -> RequestOutput:
    samples[0].samples = samples
    return samples[0]


def load_engine(model: str | Path, config: EngineConfig) -> Engine:
    """Target, drafters and KV pool for a checked configuration. ValueError if the checkpoint is broken, or a drafter or max_model_len does not fit it, or memory does not hold the buffers."""
    import torch

    from specrt.cache.memory import check_memory
    from specrt.cache.pages import pool_pages
    from specrt.cache.pool import KVPool
    from specrt.draft import build
    from specrt.models.dense import DenseModel
    from specrt.ops import FP8
    from specrt.round.run import Round
    from specrt.round.state import RoundState
    from specrt.weights import open_checkpoint

    checkpoint = open_checkpoint(model)
    served = config.for_model(checkpoint.config.max_position_embeddings).max_model_len  # refuse before the weights are read
    device, dtype = torch.device(config.device), getattr(torch, config.dtype)
    has_tokenizer = checkpoint.folder is None or (checkpoint.folder / "tokenizer.json").is_file()
    tokenizer = checkpoint.tokenizer() if has_tokenizer else None  # without one, prompts are token ids and outputs have no text
    target = DenseModel.load(checkpoint, dtype, device, config.quantization, FP8 if config.kv_cache_dtype == "fp8" else None, served)
    drafters = {name: build(c, target=target, tokenizer=tokenizer, device=device, dtype=dtype, target_name=str(model)) for name, c in config.drafters.items()}
    positions = [checkpoint.config.max_position_embeddings, *(d.max_positions for d in drafters.values() if d.max_positions is not None)]
    config = config.for_model(min(positions))
    page_bytes = KVPool.bytes_per_page(target.num_layers, target.kv_heads, config.page_size, target.head_dim, target.kv_dtype)
    page_bytes += sum(d.bytes_per_page(config.page_size) for d in drafters.values())
    memory = config.kv_cache_memory
    if memory is None and device.type == "cuda":
        memory = int(_CUDA_SHARE * torch.cuda.mem_get_info(device)[0])
    pages = pool_pages(config.max_batch_size, config.max_model_len, Round.slack_of(config.width, drafters), config.page_size, page_bytes, memory)
    if device.type == "cpu":
        logits = RoundState.vocabulary_bytes(config.max_batch_size, config.width, checkpoint.config.vocab_size)
        check_memory(config.max_batch_size, config.max_model_len, config.kv_cache_memory, pages * page_bytes, logits)
    config = config.with_pages(pages)
    return Engine(Round(target, drafters, config), tokenizer, config, checkpoint.config.vocab_size, checkpoint.config.eos_token_ids)
