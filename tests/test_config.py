"""`CUDAGraphConfig` and the two enums in it."""

import copy
import dataclasses
import itertools
import json
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cudagraph_jax.capture.registry import CUDAGraphRegistry
from cudagraph_jax.config import CUDAGraphConfig
from cudagraph_jax.errors import ConfigError, InputShapeError
from cudagraph_jax.modes import CommandBufferScope, CUDAGraphMode
from cudagraph_jax.planning.planner import plan_buckets
from cudagraph_jax.shapes.ladder import Bucket, Ladder

DEFAULTS = {
    "enabled": True,
    "capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 256],
    "capture_seq_lens": None,
    "capture_axes": {},
    "max_bucket_elements": None,
    "max_capture_batch_size": 256,
    "max_capture_seq_len": 8192,
    "on_miss": "capture",
    "on_overflow": "eager",
    "max_graphs": None,
    "use_memory_pool": True,
    "memory_pool_size_mb": 1024,
    "cudagraph_copy_inputs": True,
    "warmup_iterations": 3,
    "command_buffers": "auto",
    "per_layer_graphs": False,
    "compiler_options": {},
    "debug_mode": False,
    "compare_where": "all",
    "store": None,
    "process_timeout_s": 60.0,
}

TEXT = st.text("ax_'\"{é")
SIZES = st.sets(st.integers(1, 4096), min_size=1, max_size=8)


@st.composite
def configs(draw):
    """Any valid configuration."""
    sizes = draw(SIZES)
    lengths = draw(st.none() | SIZES)
    per_layer = draw(st.booleans())
    scopes = ("auto", "piecewise") if per_layer else tuple(CommandBufferScope)
    optional = {
        "max_capture_batch_size": st.integers(max(sizes), 9999),
        "max_capture_seq_len": st.integers(max(lengths or {1}), 9999),
        "on_miss": st.sampled_from(["capture", "eager", "error"]),
        "on_overflow": st.sampled_from(["eager", "error"]),
        "max_graphs": st.none() | st.integers(1, 99),
        "memory_pool_size_mb": st.integers(1, 99999),
        "warmup_iterations": st.integers(0, 9),
        "command_buffers": st.sampled_from(scopes),
        "capture_axes": st.dictionaries(st.sampled_from(["height", "src"]), SIZES.map(tuple)),
        "compiler_options": st.dictionaries(TEXT, TEXT | st.integers(), max_size=3),
        "enabled": st.booleans(),
        "use_memory_pool": st.booleans(),
        "cudagraph_copy_inputs": st.booleans(),
        "debug_mode": st.booleans(),
        "compare_where": st.sampled_from(["all", "mask"]),
        "process_timeout_s": st.floats(0, 999),
    }
    given = draw(st.fixed_dictionaries({}, optional=optional))
    least = math.prod(map(min, (sizes, lengths or {1}, *given.get("capture_axes", {}).values())))
    given["max_bucket_elements"] = draw(st.none() | st.integers(least, 9999 * least))
    return CUDAGraphConfig(
        capture_sizes=tuple(sizes),
        capture_seq_lens=lengths if lengths is None else tuple(lengths),
        per_layer_graphs=per_layer,
        **given,
    )


def test_defaults():
    """The default of every field, in the form that is written to JSON."""
    assert CUDAGraphConfig().to_dict() == DEFAULTS


@given(configs())
def test_equal_after_every_copy(config):
    """JSON, pickle, deep copies and the repr give an equal configuration with an equal hash."""
    names = {"CUDAGraphConfig": CUDAGraphConfig, "CommandBufferScope": CommandBufferScope}
    for same in (
        CUDAGraphConfig.from_dict(json.loads(json.dumps(config.to_dict()))),
        pickle.loads(pickle.dumps(config)),
        copy.deepcopy(config),
        dataclasses.replace(config),
        eval(repr(config), names),
    ):
        assert same == config
        assert hash(same) == hash(config)
        assert repr(same) == repr(config)
    assert "\n" not in repr(config)


@given(configs(), configs())
def test_equality_is_that_of_the_fields(one, other):
    """Two configurations are equal exactly when their written forms are."""
    assert (one == other) == (one.to_dict() == other.to_dict())


def test_repr():
    """The repr has what differs from the defaults, in the order of the fields."""
    assert repr(CUDAGraphConfig()) == "CUDAGraphConfig()"
    named = CUDAGraphConfig(max_capture_batch_size=256, command_buffers=CommandBufferScope.AUTO)
    assert repr(named) == "CUDAGraphConfig()"
    config = CUDAGraphConfig(
        enabled=False,
        capture_sizes=[4, 1],
        capture_seq_lens=(16,),
        max_bucket_elements=64,
        max_capture_batch_size=8,
        max_capture_seq_len=32,
        on_miss="eager",
        on_overflow="error",
        max_graphs=5,
        use_memory_pool=False,
        memory_pool_size_mb=7,
        cudagraph_copy_inputs=False,
        warmup_iterations=0,
        command_buffers=CommandBufferScope.FULL,
        compiler_options={"b": "2", "a": "1"},
        debug_mode=True,
        compare_where="mask",
        process_timeout_s=5,
    )
    assert repr(config) == (
        "CUDAGraphConfig(enabled=False, capture_sizes=(1, 4), capture_seq_lens=(16,), "
        "max_bucket_elements=64, max_capture_batch_size=8, max_capture_seq_len=32, "
        "on_miss='eager', on_overflow='error', max_graphs=5, use_memory_pool=False, "
        "memory_pool_size_mb=7, cudagraph_copy_inputs=False, warmup_iterations=0, "
        "command_buffers=CommandBufferScope.FULL, compiler_options={'a': '1', 'b': '2'}, "
        "debug_mode=True, compare_where='mask', process_timeout_s=5.0)"
    )
    assert repr(CUDAGraphConfig(per_layer_graphs=True)) == "CUDAGraphConfig(per_layer_graphs=True)"


def test_one_form():
    """Values that mean the same are the same configuration."""
    plain = CUDAGraphConfig(capture_sizes=(1, 4), compiler_options={"a": "1", "b": "2"})
    same = CUDAGraphConfig.from_dict(
        {
            "capture_sizes": np.array([4, 1]),
            "max_capture_batch_size": np.int32(4),
            "command_buffers": "auto",
            "compiler_options": {"b": 2, "a": 1},
        }
    )
    assert same == plain
    assert hash(same) == hash(plain)
    assert type(same.max_capture_batch_size) is int
    assert list(same.compiler_options) == ["a", "b"]


def test_immutable():
    """Nothing of a configuration can be changed, nor through what it was made of."""
    given = {"a": "1"}
    config = CUDAGraphConfig(compiler_options=given)
    given["b"] = "2"
    assert dict(config.compiler_options) == {"a": "1"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.enabled = False  # type: ignore[misc]
    with pytest.raises(TypeError, match="does not support item assignment"):
        config.compiler_options["b"] = "2"  # type: ignore[index]


def test_keyword_only():
    """Fields are given by name."""
    with pytest.raises(TypeError, match="positional"):
        CUDAGraphConfig(True)  # type: ignore[call-arg]


NO_FLAGS = [0, 1, 1.0, "yes", None]
NO_SIZES = [0, -1, True, False, 1.5, 4.0, "4", (4,)]
NO_LADDERS = [(), [], (0,), (-1, 2), (True,), (1.5,), ("1",), (None,), "12", b"12", "", 8, 2.5]
BAD: dict[str, list] = {
    "enabled": NO_FLAGS,
    "capture_sizes": [*NO_LADDERS, None, (2, 1, 2)],
    "capture_seq_lens": [*NO_LADDERS, (16, 16)],
    "capture_axes": [
        *(None, 5, "text", [("a", (1,))], {1: (1,)}, {"a b": (1,)}, {"batch": (1,)}, {"seq": (1,)}),
        *({"a": sizes} for sizes in NO_LADDERS if sizes is not None),
    ],
    "max_bucket_elements": NO_SIZES,
    "max_capture_batch_size": [*NO_SIZES, 255],
    "max_capture_seq_len": NO_SIZES,
    "on_miss": ["", "captured", None, 1, ["capture"]],
    "on_overflow": ["", "spill", None, 1, ["eager"]],
    "max_graphs": NO_SIZES,
    "use_memory_pool": NO_FLAGS,
    "memory_pool_size_mb": [*NO_SIZES, None],
    "cudagraph_copy_inputs": NO_FLAGS,
    "warmup_iterations": [-1, True, False, 0.0, 1.5, "3", None],
    "command_buffers": ["", "fulll", None, 3, CUDAGraphMode.NONE, ["full"]],
    "per_layer_graphs": NO_FLAGS,
    "compiler_options": [None, 5, "text", [("a", "b")], {1: "b"}, {"a": "b", None: "c"}],
    "debug_mode": NO_FLAGS,
    "compare_where": ["", "masks", "everywhere", None, True, ["mask"]],
    "store": [5, 1.5, ["path"], b"path", "", "a\0b"],
    "process_timeout_s": [-1, None, True, "5", float("nan"), float("inf")],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values], ids=repr
)
def test_bad_values(name, value):
    """A value that is not valid is an error that names the field."""
    with pytest.raises(ConfigError, match=rf"\b{name}\b"):
        CUDAGraphConfig.from_dict({name: value})


def test_bad_values_cover_every_field():
    """No field is left out of the bad values."""
    assert list(BAD) == [spec.name for spec in dataclasses.fields(CUDAGraphConfig)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"capture_sizes": (1, 8), "max_capture_batch_size": 4},
            "capture_sizes goes up to 8, beyond max_capture_batch_size=4: "
            "raise the maximum (None: as far as they go) or leave the larger sizes out",
        ),
        (
            {"capture_seq_lens": (16, 64), "max_capture_seq_len": 32},
            "capture_seq_lens goes up to 64, beyond max_capture_seq_len=32: "
            "raise the maximum (None: as far as they go) or leave the larger sizes out",
        ),
        (
            {"per_layer_graphs": True, "command_buffers": CommandBufferScope.FULL},
            "per_layer_graphs=True means command_buffers=PIECEWISE, but command_buffers=FULL: "
            "leave one of the two out",
        ),
        (
            {"per_layer_graphs": True, "command_buffers": "none"},
            "per_layer_graphs=True means command_buffers=PIECEWISE, but command_buffers=NONE: "
            "leave one of the two out",
        ),
        (
            {"command_buffers": "ful"},
            "command_buffers='ful' is unknown: did you mean 'full'? (auto, none, piecewise, full)",
        ),
        (
            {"capture_size": (1,)},
            "unknown configuration key 'capture_size': did you mean 'capture_sizes'? "
            f"({', '.join(DEFAULTS)})",
        ),
        ({"xyz": 1}, f"unknown configuration key 'xyz': choose one of {', '.join(DEFAULTS)}"),
    ],
    ids=lambda value: "" if isinstance(value, str) else repr(value),
)
def test_messages(fields, message):
    """Values that do not go together, are not available yet, or are unknown: what to do instead."""
    with pytest.raises(ConfigError) as caught:
        CUDAGraphConfig.from_dict(fields)
    assert str(caught.value) == message


def test_from_dict_fills_in_defaults():
    """Keys that are left out have their defaults."""
    assert CUDAGraphConfig.from_dict({}) == CUDAGraphConfig()


@pytest.mark.parametrize(
    ("fields", "limits"),
    [
        ({}, (256, 8192)),
        ({"capture_sizes": (3, 5)}, (5, 8192)),
        ({"capture_sizes": (3, 5), "max_capture_batch_size": 9}, (9, 8192)),
        ({"capture_seq_lens": (16, 64)}, (256, 64)),
        ({"capture_seq_lens": (16, 64), "max_capture_seq_len": 64}, (256, 64)),
        ({"capture_seq_lens": (16, 64), "max_capture_seq_len": 99}, (256, 99)),
        ({"max_capture_seq_len": 7}, (256, 7)),
    ],
)
def test_limits(fields, limits):
    """A limit that is not given is the largest size; without lengths, 8192."""
    config = CUDAGraphConfig(**fields)
    assert (config.max_batch_size, config.max_seq_len) == limits
    assert (config.max_capture_batch_size, config.max_capture_seq_len) == limits


@given(configs(), st.integers(-2, 10000), st.integers(-2, 10000))
def test_should_use_cudagraph(config, batch, seq):
    """A call gets a graph when both its sizes are inside their limits, and so is its bucket."""
    inside = batch in range(1, config.max_batch_size + 1) and seq in range(
        1, config.max_seq_len + 1
    )
    if config.max_bucket_elements is not None:
        inside &= config.bucket_for(batch, seq).elements <= config.max_bucket_elements
    assert config.should_use_cudagraph(batch, seq) == (inside and config.enabled)
    assert not CUDAGraphConfig.disabled().should_use_cudagraph(batch, seq)


@given(configs(), st.integers(1, 9999), st.integers(1, 9999))
def test_padded_sizes(config, batch, seq):
    """A size is padded to the smallest that holds it, and above the largest stays as it is."""

    def padded(n, sizes):
        return min((size for size in sizes or () if size >= n), default=n)

    assert config.get_padded_batch_size(batch) == padded(batch, config.capture_sizes)
    assert config.get_padded_seq_len(seq) == padded(seq, config.capture_seq_lens)
    assert config.bucket_for(batch, seq) == Bucket(
        config.get_padded_batch_size(batch), config.get_padded_seq_len(seq)
    )


def test_sizes_of_named_axes():
    """Sizes by name are padded and limited like the others; those left out are not carried."""
    config = CUDAGraphConfig(
        capture_sizes=(4,),
        capture_seq_lens=(64,),
        capture_axes={"height": (8, 16), "self": (2,)},
        max_bucket_elements=4096,
    )
    assert config.bucket_for(3, 57) == Bucket(4, 64)
    assert config.bucket_for(3, 57, height=9) == Bucket(4, 64, height=16)
    assert config.bucket_for(3, 57, height=99, self=1) == Bucket.of(
        {"batch": 4, "seq": 64, "height": 99, "self": 2}
    )
    assert config.should_use_cudagraph(3, 57, height=9)
    assert not config.should_use_cudagraph(3, 57, height=17)
    assert not config.should_use_cudagraph(3, 57, height=9, self=2)  # 8192 elements
    for asks in (config.bucket_for, config.should_use_cudagraph):
        with pytest.raises(ConfigError, match="hight=9: the config has no such axis; did you mean"):
            asks(3, 57, hight=9)


@given(configs())
def test_buckets_are_the_grid(config):
    """The grid is ascending, inside the limits, and each of its buckets is its own."""
    grid = config.buckets()
    ladders = (config.capture_sizes, config.capture_seq_lens or (1,), *config.capture_axes.values())
    most = config.max_bucket_elements or math.inf
    assert len(grid) == sum(math.prod(each) <= most for each in itertools.product(*ladders))
    assert list(grid) == sorted(set(grid))
    assert all(config.admits(bucket) == config.enabled for bucket in grid)
    assert all(config.padded(bucket) == bucket for bucket in grid)


def test_buckets():
    """The grid has every size with every length; without lengths, with the one that is given."""
    config = CUDAGraphConfig(capture_sizes=(1, 4), capture_seq_lens=(16, 64))
    assert config.buckets(seq_len=5) == config.buckets() == ((1, 16), (1, 64), (4, 16), (4, 64))
    config = CUDAGraphConfig(capture_sizes=(1, 4))
    assert config.buckets() == ((1, 1), (4, 1))
    assert config.buckets(seq_len=5) == ((1, 5), (4, 5))


def test_from_plan():
    """A plan's two ladders are the grid."""
    plan = SimpleNamespace(batch_sizes=(1,), seq_lens=[64, 16])
    config = CUDAGraphConfig.from_plan(plan)
    assert config == CUDAGraphConfig(capture_sizes=(1,), capture_seq_lens=(16, 64))
    assert config.capture_seq_lens == Ladder((16, 64))


def test_from_planned_buckets():
    """The grid of what was planned is the plan's."""
    plan = plan_buckets([(1, 9), (2, 30), (4, 9)], max_graphs=4)
    assert CUDAGraphConfig.from_plan(plan).buckets() == plan.buckets()


def test_disabled():
    """The disabled configuration differs in nothing else."""
    assert repr(CUDAGraphConfig.disabled()) == "CUDAGraphConfig(enabled=False)"


def test_memory_budget():
    """The budget is in bytes, and there is none without a memory pool."""
    assert CUDAGraphConfig(memory_pool_size_mb=3).memory_budget_bytes == 3 * 1024 * 1024
    assert CUDAGraphConfig(use_memory_pool=False).memory_budget_bytes is None


@pytest.mark.parametrize("scope", ["auto", "piecewise"])
def test_per_layer_graphs(scope):
    """`per_layer_graphs` is another name for piecewise command buffers."""
    config = CUDAGraphConfig(per_layer_graphs=True, command_buffers=scope)
    assert config.command_buffers is CommandBufferScope.PIECEWISE
    assert config.xla_options() == CommandBufferScope.PIECEWISE.compiler_options()


@pytest.mark.parametrize(
    ("scope", "options"),
    [
        ("auto", {}),
        ("none", {"xla_gpu_enable_command_buffer": ""}),
        ("piecewise", {"xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT"}),
        (
            "full",
            {
                "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,"
                "CONDITIONAL,DYNAMIC_SLICE_FUSION,WHILE,CONVOLUTION",
                "xla_gpu_graph_min_graph_size": "1",
            },
        ),
    ],
)
def test_scopes(scope, options):
    """Each scope is a set of compiler options, all of them text."""
    assert CommandBufferScope(scope).compiler_options() == options
    assert CUDAGraphConfig(command_buffers=scope).xla_options() == options


def test_compiler_options_override_the_scope():
    """An option that is given wins over the scope's, and the others stay."""
    options = {"xla_gpu_graph_min_graph_size": 5, "other": True}
    config = CUDAGraphConfig.from_dict({"command_buffers": "full", "compiler_options": options})
    assert config.xla_options() == {
        **CommandBufferScope.FULL.compiler_options(),
        "xla_gpu_graph_min_graph_size": "5",
        "other": "True",
    }


def test_enums():
    """The members of the two enums and their values in JSON."""
    assert {mode.name: mode.value for mode in CUDAGraphMode} == {
        "NONE": "none",
        "CAPTURE": "capture",
        "REPLAY": "replay",
        "DISABLED": "disabled",
    }
    assert {scope.name: scope.value for scope in CommandBufferScope} == {
        "AUTO": "auto",
        "NONE": "none",
        "PIECEWISE": "piecewise",
        "FULL": "full",
    }


@pytest.mark.parametrize("size", ["3", 2.0, True, None])
def test_sizes_that_are_none(size):
    """What is no size is refused by all that take one, and by name."""
    config = CUDAGraphConfig(capture_sizes=(4,), capture_axes={"height": (8,)})
    for call, name in (
        (lambda: config.get_padded_batch_size(size), "batch_size"),
        (lambda: config.get_padded_seq_len(size), "seq_len"),
        (lambda: config.bucket_for(size, 1), "batch_size"),
        (lambda: config.should_use_cudagraph(1, size), "seq_len"),
        (lambda: config.bucket_for(1, 1, height=size), "height"),
        (lambda: CUDAGraphRegistry(config).get(size, 1), "batch_size"),
    ):
        with pytest.raises(InputShapeError, match=rf"^{name}={size!r} is no integer: give one"):
            call()
