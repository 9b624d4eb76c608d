"""What plans its grid from the sizes that it was asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict, Unpack

from cudagraph_jax.capture.registry import CUDAGraphRegistry
from cudagraph_jax.dispatch.dispatcher import Dispatcher
from cudagraph_jax.shapes.ladder import Bucket

if TYPE_CHECKING:
    from cudagraph_jax.planning.costs import Cost
    from cudagraph_jax.planning.plan import BucketPlan
    from cudagraph_jax.planning.planner import Headroom


class PlanOptions(TypedDict, total=False):
    """What `replan` takes beside the number of buckets.

    Attributes:
        cost: As for `plan_buckets`, and so are the next three.
        batch_multiple: Batch sizes are multiples of it.
        seq_multiple: Sequence lengths are multiples of it.
        headroom: A bucket for sizes that were not seen yet; None: up to the largest bucket of
            today, so that what fits now still does; 0.0: up to the largest that was asked for.
        max_batch_size: Larger batches are left out of the plan.
        max_seq_len: Longer sequences are left out of the plan.
    """

    cost: Cost | None
    batch_multiple: int
    seq_multiple: int
    headroom: Headroom | None
    max_batch_size: int
    max_seq_len: int


class Planned:
    """The part of a manager that knows what was asked for.

    Attributes:
        registry: The captured buckets.
        dispatcher: What serves the calls.
    """

    registry: CUDAGraphRegistry
    dispatcher: Dispatcher

    def sizes(self) -> dict[Bucket, int]:
        """How often each (batch, seq_len) was asked for, since the start or `reset`.

        Where there are thousands of different sizes, similar ones are counted together, rounded
        up. `replan` halves the counts (no size is forgotten), so that newer requests weigh more in
        the next one.
        """
        return self.registry.asked_sizes()

    def replan(
        self, *, max_graphs: int | None = None, **options: Unpack[PlanOptions]
    ) -> BucketPlan:
        """Plans the grid anew from the sizes that were asked for, and changes to it.

        The new grid is captured in the background, for every program that has captured buckets,
        while the old one serves; then it takes its place as a whole, and no request waits. Both
        are held until then. If anything fails, the old grid stays and a `CUDAGraphWarning` says
        why. A newer plan takes the place of one that waits. `wait()` waits for the end.

        The largest size that was asked for gets a bucket, also where it was outside the limits:
        `max_batch_size` and `max_seq_len` leave larger ones to `on_overflow`. What fits today
        still fits, limits above the ladders included, unless `headroom`, `max_batch_size` or
        `max_seq_len` says otherwise: `headroom=0.0` gives it up for less padding.

        Args:
            max_graphs: The most buckets; as many as the grid has now if None.
            **options: Keywords of `PlanOptions`: cost, batch_multiple, seq_multiple, headroom,
                max_batch_size, max_seq_len.

        Returns:
            The plan that is being put in place.

        Raises:
            ConfigError: Nothing was asked for yet, an option is not valid, or the new grid does
                not fit the limits.
            SealedError: The mode does not allow captures.
            CUDAGraphError: The manager is closed, or its queue of captures is full.
        """
        from cudagraph_jax.dispatch.replan import plan_from, replan_later

        plan = plan_from(self.sizes(), self.dispatcher.config, max_graphs=max_graphs, **options)
        given = (options.get(name) for name in ("headroom", "max_batch_size", "max_seq_len"))
        replan_later(self.dispatcher, plan, keeps_limits=all(value is None for value in given))
        return plan
