"""A pickle that names what no executable is made of is refused before it is unpickled."""

from __future__ import annotations

import pytest

from cudagraph_jax import StoreError
from cudagraph_jax.xla import serialize
from tests.helpers.processes import said_by


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


@pytest.mark.parametrize(
    "name",
    ["builtins.eval", "builtins.exec", "builtins.getattr", "builtins.__import__", "builtins.str",
     "os.system", "posix.system", "subprocess.Popen", "functools.partial", "operator.attrgetter",
     "collections.namedtuple", "numpy.load", "numpy.memmap", "ml_dtypes.finfo",
     "numpy.f2py.__main__.dtype", "jax.experimental.jax2tf.P", "jax.no_such_name"],
)  # fmt: skip
def test_names_that_no_executable_needs(name):
    """Python's functions, NumPy's other ones, and modules that are not imported are refused."""
    module, _, called = name.rpartition(".")
    with pytest.raises(StoreError, match=f"names {name}, which no executable needs"):
        serialize.check_pickle(b"\x80\x04" + named(module, called) + b".")


@pytest.mark.parametrize(
    ("module", "name"),
    [("jax", "_src.xla_bridge.os.system"), ("jax._src.xla_bridge", "os.system"),
     ("jax._src.core", "partial"), ("jax._src.core", "ShapedArray.__init__.__globals__"),
     ("jax.numpy", "np.memmap"), ("jaxlib", "cpu_feature_guard.__loader__.load_module"),
     ("collections", "_sys.modules"), ("builtins", "set.__init__")],
)  # fmt: skip
def test_names_that_walk_out(module, name):
    """What a module of JAX has only imported is not JAX's, by whatever way it is named."""
    with pytest.raises(StoreError, match="which no executable needs"):
        serialize.check_pickle(b"\x80\x04" + named(module, name) + b".")


ATTACKS = {
    "a function called": named("jax.numpy", "load") + text("file") + b"\x85R",
    "a number for a function": named("jax", "make_jaxpr") + b"K\x05\x85R",
    "a class changed": named("jax.sharding", "Mesh") + b"N}" + text("size") + b"K\x01s\x86b",
    "a function changed": named("jax", "make_jaxpr") + b"}" + text("size") + b"K\x01sb",
    "a name that is made": named("jax", "ShapeDtypeStruct") + b")R" + text("system") + b"\x93",
    "an extension": b"\x82\xf0",
    "another extension": b"\x83\xf0\x00",
    "a long extension": b"\x84\xf0\x00\x00\x00",
    "a name of protocol 0": b"cos\nsystem\n",
    "a class of protocol 0": b"(ios\nsystem\n",
    "an unknown reference": text("file") + b"\x85Q",
    "a reference that is a name": text("exec") + b"Q",
    "a reference of protocol 0": b"Pexec\n",
    "code that is no bytes": text("exec") + text("x") + b"\x86Q",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_executables_never_do(attack):
    """Functions are not called, nothing named is changed, and nothing is taken from a cache."""
    with pytest.raises(StoreError, match="its pickle"):
        serialize.check_pickle(b"\x80\x04" + ATTACKS[attack] + b".")


@pytest.mark.parametrize(
    ("module", "name"),
    [("jax", "ShapeDtypeStruct"), ("jax.sharding", "Mesh"), ("jax.stages", "ArgInfo"),
     ("jax.numpy", "bfloat16"), ("ml_dtypes", "int4"), ("numpy", "dtype"), ("numpy", "float32"),
     ("builtins", "complex"), ("collections", "OrderedDict")],
)  # fmt: skip
def test_classes_that_may_be_named(module, name):
    """Classes of JAX, by whatever module has them, types of numbers, and plain containers."""
    serialize.check_pickle(b"\x80\x04" + named(module, name) + b".")


ATTACK = """
    import pickle, sys
    import jax
    from cudagraph_jax import StoreError
    from cudagraph_jax.xla import serialize
    from tests.xla.test_unpickle import named, text
    before = set(sys.modules)
    {before}
    try:
        serialize.load(b"\\x80\\x04" + {data} + b".", inputs=jax.tree.structure(1),
                       outputs=jax.tree.structure(1), devices=jax.devices())
    except StoreError as error:
        print(error)
    print("lives on, and has imported", {{name for name in set(sys.modules) - before
                                          if name.startswith(("numpy.f2py", "jax.exp"))}})
"""


@pytest.mark.parametrize("module", ["numpy.f2py.__main__", "jax.experimental.jax2tf"])
def test_nothing_is_imported(module):
    """A module that would end the process, or take its time, is not imported for its name."""
    said = said_by(ATTACK.format(before="", data=f"named({module!r}, 'P')"))
    assert "its pickle" in said
    assert said.endswith("lives on, and has imported set()\n")


def test_an_extension_that_the_application_has_used(tmp_path):
    """Not even what Python has in its cache of extensions is called."""
    path = tmp_path / "planted"
    said = said_by(
        ATTACK.format(
            before="import copyreg; copyreg.add_extension('posix', 'system', 240); "
            "pickle.loads(b'\\x80\\x04\\x82\\xf0.')",
            data=f"b'\\x82\\xf0' + text('touch {path}') + b'\\x85R'",
        )
    )
    assert "uses an extension" in said
    assert not path.exists()
