"""A whole decoder served through `bucket_jit`: prefill and decode, the KV cache donated."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from cudagraph_jax import (
    BucketOverflowError,
    ConfigError,
    CUDAGraphConfig,
    WarmupReport,
    bucket_jit,
)
from cudagraph_jax._base.checks import positive_size
from cudagraph_jax.demo.bert.tokens import IntArray, stack
from cudagraph_jax.demo.decoder.decoder_params import DecoderConfig, DecoderParams, random_params
from cudagraph_jax.demo.decoder.prompts import Prompt, checked_prompts
from cudagraph_jax.demo.decoder.state import DecodeState, gathered
from cudagraph_jax.demo.decoder.transformer import greedy_prefill, greedy_step
from cudagraph_jax.report.progress import Callback
from cudagraph_jax.shapes.ladder import Bucket

BATCH_SIZES = (1, 4)
PROMPT_LENS = (16, 64)
CONTEXT_LENS = (64, 256, 1024)


class Decoder:
    """Prompts to continuations, greedily, in buckets for prefill and for decode.

    The KV cache stays on the device in the shape of a decode bucket and is donated from step to
    step. When its rows outgrow their context, it is copied into the next bucket's shape.

    Args:
        params: The weights; small random ones if None.
        prefill_config: Buckets (batch, prompt length); a small grid if None.
        decode_config: Buckets (batch, context length), with batch sizes as large; a small grid if
            None.

    Attributes:
        params: The weights, on the device.
        prefill_function: The `BucketedFunction` of `greedy_prefill`.
        decode_function: The `BucketedFunction` of `greedy_step`.

    Raises:
        ConfigError: A configuration without `capture_seq_lens`, or whose decode buckets are
            smaller than those for prefill.

    Example:
        >>> decoder = Decoder()
        >>> decoder.generate([[1, 2, 3], [4]], 5).shape
        (2, 5)
    """

    def __init__(
        self,
        params: DecoderParams | None = None,
        *,
        prefill_config: CUDAGraphConfig | None = None,
        decode_config: CUDAGraphConfig | None = None,
    ) -> None:
        if prefill_config is None:
            prefill_config = _grid(PROMPT_LENS)
        if decode_config is None:
            decode_config = _grid(CONTEXT_LENS)
        self._prefill_limit = _largest(prefill_config, "prefill_config")
        self._decode_limit = _largest(decode_config, "decode_config")
        if not self._decode_limit.holds(self._prefill_limit):
            raise ConfigError(
                f"the largest decode bucket, {self._decode_limit}, does not hold the largest "
                f"prefill bucket, {self._prefill_limit}: add decode sizes"
            )
        params = random_params(DecoderConfig()) if params is None else params
        self.params: DecoderParams = jax.device_put(params)
        self.prefill_function = bucket_jit(
            greedy_prefill,
            in_axes=(None, "batch seq", "batch"),
            unpad="none",
            config=prefill_config,
        )
        self.decode_function = bucket_jit(
            greedy_step,
            in_axes=(None, "batch _ seq _", "batch", "batch"),
            unpad="none",
            # Not the tokens: `generate` reads them at the end, so that no step waits.
            donate_argnums=(1, 3),
            config=decode_config,
        )

    def warmup(
        self, *, progress: Callback | bool | None = None
    ) -> tuple[WarmupReport, WarmupReport]:
        """Captures both grids, so that nothing compiles afterwards.

        Args:
            progress: As for `BucketedFunction.warmup`.

        Returns:
            What became of the buckets for prefill, and of those for decode.
        """
        row = jax.ShapeDtypeStruct((1,), np.int32)
        prompt = jax.ShapeDtypeStruct((1, 1), np.int32)
        cache, _, _ = jax.eval_shape(greedy_prefill, self.params, prompt, row)
        # Decode last: on a GPU a later compile makes recorded graphs record once more.
        return (
            self.prefill_function.warmup(self.params, prompt, row, progress=progress),
            self.decode_function.warmup(self.params, cache, row, row, progress=progress),
        )

    def generate(self, prompts: Sequence[Prompt], max_new_tokens: int) -> IntArray:
        """The likeliest continuation of each prompt.

        Args:
            prompts: Token ids of each prompt, of any lengths.
            max_new_tokens: How many tokens to add to each.

        Returns:
            int32 (len(prompts), max_new_tokens).

        Raises:
            InputShapeError: No prompt, an empty one, or something that is no token id.
            BucketOverflowError: More prompts, or longer ones, than the buckets hold.
            ConfigError: `max_new_tokens` is no size.
        """
        count = positive_size(max_new_tokens, name="max_new_tokens")
        rows = self._checked(prompts)
        longest, context = max(map(len, rows)), self._decode_limit.seq_len
        # The last token is never read, so that it needs no place.
        if longest + count - 1 > context:
            raise BucketOverflowError(
                f"a prompt of {longest} tokens and max_new_tokens={count} are more than the "
                f"largest context, {context}: ask for fewer, or add decode buckets"
            )
        state = self.start(rows)
        tokens = [state.tokens]
        for _ in range(count - 1):
            state = self.step(state)
            tokens.append(state.tokens)
        # Only now does anything wait for the device.
        return np.stack([np.asarray(row)[: state.rows] for row in tokens], axis=1)

    def start(self, prompts: Sequence[Prompt]) -> DecodeState:
        """Reads the prompts: the state holds the first token after each.

        Raises:
            InputShapeError: No prompt, an empty one, or something that is no token id.
            BucketOverflowError: More prompts, or longer ones, than the buckets hold.
        """
        tokens, mask = stack(self._checked(prompts))
        cache, first, positions = self.prefill_function(
            self.params, tokens, mask.sum(axis=1, dtype=np.int32)
        )
        rows, longest = tokens.shape
        return DecodeState(
            cache=cache, tokens=first, positions=positions, rows=rows, longest=longest
        )

    def step(self, state: DecodeState) -> DecodeState:
        """Reads the newest token of each row: the state that it returns holds the next ones.

        Args:
            state: Donated, unless its cache has to grow first.

        Raises:
            BucketOverflowError: The largest context is full.
        """
        state = self._fitted([state], state.longest + 1)
        cache, tokens, positions = self.decode_function(
            self.params, state.cache, state.tokens, state.positions
        )
        return DecodeState(
            cache=cache,
            tokens=tokens,
            positions=positions,
            rows=state.rows,
            longest=state.longest + 1,
        )

    def join(self, *states: DecodeState) -> DecodeState:
        """One state with the rows of all, so that new requests join those that are running.

        Raises:
            BucketOverflowError: The largest decode bucket has fewer rows.
        """
        return self._fitted(states, max(state.longest for state in states) + 1)

    def _checked(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        rows = checked_prompts(prompts, vocab_size=self.params.embedding.shape[0])
        longest = max(map(len, rows))
        if not self._prefill_limit.holds(Bucket(len(rows), longest)):
            raise BucketOverflowError(
                f"{len(rows)} prompts of up to {longest} tokens are more than the largest prefill "
                f"bucket, {self._prefill_limit}: give less, or add prefill buckets"
            )
        return rows

    def _fitted(self, states: Sequence[DecodeState], places: int) -> DecodeState:
        """The rows of all states in the smallest bucket with so many places."""
        rows = sum(state.rows for state in states)
        if not self._decode_limit.holds(Bucket(rows, places)):
            raise BucketOverflowError(
                f"{rows} rows with {places} places are more than the largest decode bucket, "
                f"{self._decode_limit}: add decode buckets"
            )
        bucket = self.decode_function.manager.config.bucket_for(rows, places)
        if len(states) == 1 and states[0].bucket == bucket:
            return states[0]
        return gathered(states, bucket)


def _grid(seq_lens: Sequence[int]) -> CUDAGraphConfig:
    # A CPU has no command buffers to record: it is warm after one run.
    runs = 1 if jax.default_backend() == "cpu" else CUDAGraphConfig().warmup_iterations
    return CUDAGraphConfig(
        capture_sizes=BATCH_SIZES, capture_seq_lens=seq_lens, warmup_iterations=runs
    )


def _largest(config: CUDAGraphConfig, name: str) -> Bucket:
    if config.capture_seq_lens is None:
        raise ConfigError(f"{name} has no capture_seq_lens: give the lengths that get a graph")
    return Bucket(max(config.capture_sizes), max(config.capture_seq_lens))
