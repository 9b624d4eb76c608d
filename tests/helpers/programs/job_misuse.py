"""What several processes must not do, one after the other; run by test_guard.py."""

from __future__ import annotations

import resource
import threading
import time
from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import cudagraph_jax as cg
from cudagraph_jax import distributed
from tests.helpers.member import (
    INDEX,
    SPREAD,
    TABLE,
    WEIGHTS,
    WHOLE,
    ids,
    is_right,
    leave,
    made,
    mean,
    say,
    say_error,
)


def other(weights, ids, *, mask):
    """Another function."""
    return mean(weights, ids, mask=mask) + 1


def spread(weights, ids, *, mask):
    """Vectors that stay on the devices of several processes."""
    vectors = weights[ids].sum(axis=(0, 1)) * jnp.sum(mask)
    return jax.lax.with_sharding_constraint(vectors, SPREAD)


def local_mean(weights, ids, *, mask):
    """The same mean, on the devices of one process."""
    return jnp.sum(weights[ids] * mask[..., None], axis=1) / jnp.sum(mask, axis=1, keepdims=True)


def in_thread(act):
    errors = []

    def run():
        try:
            act()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="second")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def setting_up():
    """Warm-ups that differ."""
    warm = [
        ("configuration", made(capture_sizes=(1, 4 + INDEX))),
        ("function", made([mean, other][INDEX])),
        ("unreadable", made(spread, name="spread")),
    ]
    for name, function in warm:
        say_error(name, partial(function.warmup, WEIGHTS, ids(1, 3), progress=False))
    left = made(spread, name="spread", unpad="none")
    left.warmup(WEIGHTS, ids(1, 3), progress=False)
    say("left on the device", not left(WEIGHTS, ids(1, 4)).is_fully_addressable)


def calling(embed, head):
    """Calls that differ."""
    say("a call", is_right(embed(WEIGHTS, ids(3, 5)), ids(3, 5)))
    say_error("sizes", lambda: embed(WEIGHTS, ids(3 + INDEX, 5)))
    say_error("data", lambda: embed(WEIGHTS, ids(3, 5, INDEX)))
    say_error("buckets", lambda: embed(WEIGHTS, ids(1 + INDEX, 5)))
    say_error("order", lambda: [embed, head][INDEX](WEIGHTS, ids(3, 5)))
    say("a call after them", is_right(embed(WEIGHTS, ids(2, 8)), ids(2, 8)))


def fragile(weights, ids, *, mask):
    """A function that one process alone cannot trace."""
    if jax.process_index():
        raise ValueError("only here")
    return mean(weights, ids, mask=mask)


def untraceable(weights, ids, *, mask):
    """A function that no process can trace."""
    raise ValueError("nowhere")


def crowding(function):
    """Has the grid of a function have no room on one process alone; what takes that, to be kept."""
    own = cg.bucket_jit(jnp.sum, in_axes="batch seq", manager=function.manager)
    if INDEX:
        own(np.ones((1, 4), np.float32))
    return own


def refusing(embed):
    """What one process refuses and the others would do: they learn it, and the job goes on."""
    rows = [ids(9, 5), ids(3, 5)]
    strict = made(on_overflow="error", name="strict")
    strict.warmup(WEIGHTS, ids(1, 3), progress=False)
    say_error("outside alone", lambda: strict(WEIGHTS, rows[INDEX]))
    say_error("outside alike", lambda: strict(WEIGHTS, ids(9, 5)))
    say_error("eager alone", lambda: embed(WEIGHTS, rows[INDEX]))
    say_error("bad input alone", lambda: embed(WEIGHTS, [ids(3, 5), ids(3, 5)[0]][INDEX]))
    say_error("bad input alike", lambda: embed(WEIGHTS, np.ones((3, 5))))
    say_error("bad call alone", lambda: embed(*[(WEIGHTS, ids(3, 5)), (WEIGHTS,)][INDEX]))
    sealed = made(name="sealed", on_miss="error")
    if INDEX:
        sealed.seal()
    say_error("sealed alone", lambda: sealed(WEIGHTS, ids(3, 5)))
    call = partial(embed, WEIGHTS, ids(3, 5))
    say_error("thread alone", [call, partial(in_thread, call)][INDEX])
    held = jax.device_put(WEIGHTS, SPREAD) + 0
    embed(held, ids(3, 5))
    if INDEX:
        held.delete()
    say_error("deleted alone", lambda: embed(held, ids(3, 5)))
    cut = made(name="cut", on_overflow="split")
    cut(WEIGHTS, ids(5, 5))
    if INDEX:
        cut.registry.remove(1, 8)
    say_error("piece alone", lambda: cut(WEIGHTS, ids(5, 5)))
    say_error("sealed warm-up", partial(sealed.warmup, WEIGHTS, ids(1, 3), progress=False))
    crowded = made(name="crowded", max_graphs=4)
    own = crowding(crowded)
    say_error("room alone", partial(crowded.warmup, WEIGHTS, ids(1, 3), progress=False))
    del own
    warm = partial(embed.warmup, WEIGHTS, progress=False)
    say_error("example of other sizes", lambda: warm(ids(1 + INDEX, 3)))
    say_error("example of other data", lambda: warm(ids(1, 3, INDEX)))
    say_error("example alone", lambda: warm([ids(1, 3), ids(1, 3)[0]][INDEX]))
    say_error("trace alike", lambda: made(untraceable, name="untraceable")(WEIGHTS, ids(3, 5)))
    broken = made(fragile, name="fragile")
    say_error("trace alone", partial(broken.warmup, WEIGHTS, ids(1, 3), progress=False))
    say_error("trace alone in a call", lambda: broken(WEIGHTS, ids(3, 5)))
    say("a call behind what is refused", is_right(embed(WEIGHTS, ids(3, 5)), ids(3, 5)))


def declaring():
    """Functions that are declared in another way, captured when they are called, or led."""
    declared = [
        ("code", made([mean, other][INDEX])),
        ("padding", made(pad_values=(None, INDEX))),
        ("side", made(pad_side=(None, ["right", "left"][INDEX]))),
    ]
    for name, function in declared:
        say_error(f"{name} in a call", partial(function, WEIGHTS, ids(3, 5)))
        say_error(f"{name} led", partial(led, function))
    for name, array in (("value", TABLE + INDEX), ("dtype", [TABLE, TABLE.astype(int)][INDEX])):
        say_error(f"{name} of a parameter", partial(led, made(), ({"a": TABLE, "b": array},)))
    places = [WHOLE, SPREAD]
    say_error("place of a parameter", partial(led, made(), (placed(TABLE, places[INDEX]),)))
    say_error("debug_mode led", partial(led, made(debug_mode=True)))
    function = made()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if INDEX == 0:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    say_error("no room for a door", partial(led, function))
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    say_error("both lead", distributed.lead(function, WEIGHTS).__enter__)
    say_error("nothing passed", partial(led, function, [(WEIGHTS,), ()][INDEX]))


def led(function, passed=(WEIGHTS,)):
    """Leads or follows."""
    if INDEX:
        distributed.follow(function, *passed)
    else:
        distributed.lead(function, *passed).__enter__()


def deciding(embed):
    """What a process would decide alone."""
    rows = ids(3, 5)
    say_error("eager", lambda: embed(WEIGHTS, ids(9, 5)))
    say_error("eager miss", lambda: made(on_miss="eager")(WEIGHTS, rows))
    say_error("background", lambda: made(on_miss="background")(WEIGHTS, rows))
    small = made(max_graphs=1)
    say("captured when asked for", is_right(small(WEIGHTS, rows), rows))
    cut = made(on_overflow="split")
    say("in pieces", is_right(cut(WEIGHTS, ids(9, 5)), ids(9, 5)))
    exact = made(on_overflow="exact")
    say("of its own size", is_right(exact(WEIGHTS, ids(9, 5)), ids(9, 5)))
    say_error("eviction", lambda: small(WEIGHTS, ids(1, 3)))
    say_error("replan", lambda: embed.replan(max_graphs=2))
    entry = embed.registry.entries()[0]
    say_error("replay", lambda: entry.replay((WEIGHTS, rows)))
    say_error("threads", lambda: in_thread(lambda: embed(WEIGHTS, rows)))
    say_error("batcher", lambda: cg.Batcher(embed, WEIGHTS).submit(rows[0]))
    for name, function, first in (
        ("wrong side", embed, 1),
        ("led with another", made(capture_sizes=(1, 4 + INDEX)), 0),
    ):
        leads = distributed.lead(function, WEIGHTS).__enter__
        follows = partial(distributed.follow, function, WEIGHTS)
        say_error(name, leads if first == INDEX else follows)


def spreading():
    """A function that spreads its rows over the processes itself, as no argument shows."""

    def squares(x):
        rows = jax.lax.with_sharding_constraint(x, SPREAD)
        return jax.lax.with_sharding_constraint(rows * rows, WHOLE)

    config = cg.CUDAGraphConfig(capture_sizes=(2, 4), capture_seq_lens=(8,))
    spread = cg.bucket_jit(squares, in_axes="batch seq", config=config)
    rows = np.ones((2, 5), np.float32)
    say_error("first data", lambda: spread(rows + INDEX))
    for _ in range(2):
        say("spread", bool((spread(rows) == 1).all()))
    say_error("second data", lambda: spread(rows + INDEX))
    say_error("second sizes", lambda: spread(np.ones((3 + INDEX, 5), np.float32)))
    say_error("spread eagerly", lambda: spread(np.ones((9, 5), np.float32)))
    say_error("spread batcher", lambda: cg.Batcher(spread).submit(rows[0]))


def padding():
    """Arguments that are prepared ahead, and go to the devices of both processes."""
    cut = made(name="ahead", capture_sizes=(4, 8), in_shardings=(SPREAD, SPREAD))
    cut.warmup(WEIGHTS, ids(1, 3), progress=False)
    say("padded ahead", is_right(cut(*cut.pad(WEIGHTS, ids(3, 5))), ids(3, 5)))
    with jax.transfer_guard("disallow") if INDEX else nullcontext():
        say("moved explicitly on one alone", is_right(cut(WEIGHTS, ids(3, 5)), ids(3, 5)))
    say_error("padded sizes", lambda: cut.pad(WEIGHTS, ids(3 + INDEX, 5)))
    say_error("padded data", lambda: cut.pad(WEIGHTS, ids(3, 5, INDEX)))
    say_error("padded badly alone", lambda: cut.pad(WEIGHTS, [ids(3, 5), ids(3, 5)[0]][INDEX]))


def placed(array, place):
    """An array on the devices of both processes."""
    return jax.make_array_from_callback(array.shape, place, lambda index: array[index])


def chaining():
    """Arrays on several processes that a function takes from another, or from whoever made them."""

    def vectors(weights, ids, *, mask):
        return jax.lax.with_sharding_constraint(weights[ids], SPREAD)

    def averaged(weights, vectors, *, mask):
        kept = jnp.where(mask[..., None], vectors, 0).sum(1)
        return jax.lax.with_sharding_constraint(kept / mask.sum(1, keepdims=True), WHOLE)

    def head(name, place, **options):
        axes, grid = (None, "batch seq _"), {"capture_sizes": (4, 8)} | options
        return made(averaged, name=name, in_axes=axes, in_shardings=(SPREAD, place), **grid)

    grid: dict[str, Any] = {"capture_sizes": (4, 8), "in_shardings": (SPREAD, SPREAD)}
    encoder = made(vectors, name="vectors", unpad="padded", **grid)
    encoder.warmup(WEIGHTS, ids(1, 3), progress=False)
    rows = ids(3, 5)
    same = head("same", SPREAD)
    same.warmup(WEIGHTS, encoder(WEIGHTS, rows), progress=False)
    say("chained", is_right(same(WEIGHTS, encoder(WEIGHTS, rows)), rows))
    say_error("chained to another place", lambda: head("w", WHOLE)(WEIGHTS, encoder(WEIGHTS, rows)))
    other = head("grid", SPREAD, capture_seq_lens=(16,))
    say_error("chained to another grid", lambda: other(WEIGHTS, encoder(WEIGHTS, rows)))
    taking = made(name="taking", **grid)
    given = [placed(rows, SPREAD) for rows in (ids(4, 8), ids(4, 5))]
    taking.warmup(WEIGHTS, given[1], progress=False)
    say("taken as it is", is_right(taking(WEIGHTS, given[0]), ids(4, 8)))
    say_error("to be padded", lambda: taking(WEIGHTS, given[1]))
    say_error("to be padded ahead", lambda: taking.pad(WEIGHTS, given[1]))
    lost = placed(TABLE, WHOLE)
    say_error("parameters elsewhere", lambda: taking(lost, rows))
    warm = made(name="warm", **grid).warmup
    say_error("warmed up with them", lambda: warm(lost, rows, progress=False))


class Model:
    """A pytree of one array, beside a function that is no part of what can be written as text."""

    def __init__(self, table, act):
        if not hasattr(table, "shape"):
            raise TypeError("a model takes arrays alone")
        self.table, self.act = table, act


jax.tree_util.register_pytree_node(
    Model, lambda model: ((model.table,), model.act), lambda act, tables: Model(*tables, act)
)


def of_models():
    """Functions that are arguments, or part of one: they stand elsewhere in each process."""

    def applied(act, model, ids):
        table = jax.lax.with_sharding_constraint(model.act(model.table), WHOLE)
        return Model(act(table[ids].sum(1)), act)

    config = cg.CUDAGraphConfig(capture_sizes=(1, 4), capture_seq_lens=(8,), process_timeout_s=20)
    function = cg.bucket_jit(
        applied,
        in_axes=(None, None, "batch seq"),
        static_argnames=("act",),
        config=config,
        unpad="none",
    )
    model, rows = Model(WEIGHTS, lambda x: x * 2), ids(4, 8)
    expected = jnp.maximum(2 * TABLE[rows].sum(1), 0)
    function.warmup(jax.nn.relu, model, rows, progress=False)
    found = [function(jax.nn.relu, model, rows)]
    if INDEX:
        distributed.follow(function, jax.nn.relu, model)
    else:
        with distributed.lead(function, jax.nn.relu, model) as leader:
            found.append(leader(rows))
    say("of models", all(np.allclose(each.table, expected, atol=1e-5) for each in found))
    acts = [jax.nn.relu, jax.nn.tanh]
    say_error("another function", lambda: function(acts[INDEX], model, rows))
    function(jax.nn.tanh, model, rows)
    say_error("another program", lambda: function(acts[INDEX], model, rows))
    say_error("another model led", partial(led, function, (jax.nn.relu, Model(WEIGHTS, INDEX))))


def alone():
    """A function of this process's own arrays is nobody else's business."""
    own = made(local_mean, name="own", on_miss="background")
    weights = jnp.asarray(TABLE)
    for seed in range(3 * INDEX + 2):
        rows = ids(1 + seed, 3 + INDEX, seed)
        assert is_right(own(weights, rows), rows)
    own.manager.wait()
    say("alone", own.stats()["registry"]["num_graphs"])


def absent():
    """One process does not call: whoever waits is told so, and so is who comes too late."""
    late = made(process_timeout_s=0.5)
    start = time.monotonic()
    late(WEIGHTS, ids(3, 5))
    if INDEX == 0:
        say_error("absent", lambda: late(WEIGHTS, ids(3, 5)))
        say("absent for", time.monotonic() - start)
    else:
        time.sleep(1.5)
        say_error("late", lambda: late(WEIGHTS, ids(3, 5)))


setting_up()
embed, head = made(), made(name="head")
embed.warmup(WEIGHTS, ids(1, 3), progress=False)
head.warmup(WEIGHTS, ids(1, 3), progress=False)
calling(embed, head)
deciding(embed)
refusing(embed)
declaring()
spreading()
padding()
chaining()
of_models()
alone()
say("a last call", is_right(embed(WEIGHTS, ids(4, 8)), ids(4, 8)))
absent()
say("devices", jax.device_count())
say("end", True)
leave()
