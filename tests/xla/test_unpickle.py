"""What executables never hold is refused before it is unpickled."""

from __future__ import annotations

import pickle

import pytest

from cudagraph_jax import StoreError
from cudagraph_jax.xla import unpickle as pickled
from tests.helpers.processes import said_by


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def named(path: str) -> bytes:
    module, _, name = path.rpartition(".")
    return text(module) + text(name) + b"\x93"


NUMBERS = named("numpy.dtype") + text("f4") + b"\x89\x88\x87R"
OBJECTS = named("numpy.dtype") + text("O8") + b"\x89\x88\x87R"
OBJECTS_STATE = b"(K\x03" + text("|") + b"NNN" + b"J\xff\xff\xff\xff" * 2 + b"K?tb"
EMPTY_ARRAY = (
    named("numpy._core.multiarray._reconstruct") + named("numpy.ndarray") + b"K\x00\x85C\x01b\x87R"
)
HIDDEN = (  # Eight bytes, of which a field is an object, with flags that say that there is none.
    named("numpy.dtype")
    + text("V8")
    + b"\x89\x88\x87R(K\x03"
    + text("|")
    + b"N"
    + text("f")
    + b"\x85}"
    + text("f")
    + OBJECTS
    + b"K\x00\x86sK\x08K\x01K\x00tb"
)
RAW = named("numpy.ndarray") + b"K\x01\x85" + HIDDEN + b"C\x08AAAAAAAA\x87R"
MESH = named("jax._src.mesh.Mesh")
ATTACKS = {
    "runs a module": named("numpy.f2py.__main__.dtype"),
    "imports a module": named("jax.experimental.jax2tf.P"),
    "bytes as pointers": MESH + RAW + text("x") + b"\x85\x86R",
    "a type with fields": HIDDEN,
    "numbers that own objects": NUMBERS + OBJECTS_STATE,
    "an array of bytes": EMPTY_ARRAY
    + b"(K\x01K\x01\x85"
    + OBJECTS
    + OBJECTS_STATE
    + b"\x89C\x08AAAAAAAAtb",
    "too few devices": EMPTY_ARRAY
    + b"(K\x01K\x02\x85"
    + OBJECTS
    + OBJECTS_STATE
    + b"\x89]"
    + text("device")
    + b"K\x00\x86Qatb",
    "an array that is not filled": MESH + EMPTY_ARRAY + text("x") + b"\x85\x86R",
    "a large array": named("numpy.ndarray") + b"J\xff\xff\xff\x7f\x85\x85R",
    "a random key made": named("jax._src.random.threefry2x32.threefry_seed") + b"K\x05\x85R",
    "a number made": named("ml_dtypes.bfloat16") + b"K\x05\x85R",
    "a class changed": named("jax._src.mesh.Mesh") + b"N}" + text("size") + b"K\x01s\x86b",
    "a function changed": named("jax._src.random.rbg._rbg_seed") + b"}b",
    "a mesh changed": named("jax.P") + b")\x81}" + text("size") + b"K\x01sb",
    "a class exchanged": named("jax._src.stages.ArgInfo")
    + b")\x81N}"
    + text("__class__")
    + b"K\x01s\x86b",
    "filled twice": named("jaxlib._jax.DeviceList") + b")\x81)b)b",
    "a new enumeration": named("jax._src.mesh.AxisType") + text("A") + text("B") + b"\x86R",
    "a class as a value": named("jax.P") + named("jax.P") + b"\x85R",
    "an extension": b"\x82\xf0",
    "another extension": b"\x83\xf0\x00",
    "a long extension": b"\x84\xf0\x00\x00\x00",
    "a name of protocol 0": b"cos\nsystem\n",
    "a class of protocol 0": b"(ios\nsystem\n",
    "an unknown reference": text("file") + b"\x85Q",
    "a reference that is a name": text("exec") + b"Q",
    "code that is no bytes": text("exec") + text("x") + b"\x86Q",
    "a device by its truth": text("device") + b"\x88\x86Q",
    "bytes of an older protocol": b"\x80\x02N",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_executables_never_do(attack):
    """What would import, call, change or misread something is refused before it is unpickled."""
    with pytest.raises(StoreError, match="its pickle"):
        pickled.check(b"\x80\x04" + ATTACKS[attack] + b".")


@pytest.mark.parametrize(
    "name",
    ["builtins.eval", "jax._src.core.eval", "jax.numpy.load", "numpy.load", "os.system",
     "jaxlib.xla_client.Client", "jax._src.core.ShapedArray.__init__.__globals__"],
)  # fmt: skip
def test_names_that_no_executable_needs(name):
    """Functions of JAX and NumPy, and ways through an allowed class, are refused as well."""
    module, _, called = (
        name.rpartition(".")
        if "Shaped" not in name
        else ("jax._src.core", ".", "ShapedArray.__init__.__globals__")
    )
    data = b"\x80\x04" + text(module) + text(called) + b"\x93."
    with pytest.raises(StoreError, match="which no executable needs"):
        pickled.check(data)


def test_a_list_that_grows_later():
    """What was looked at cannot be added to afterwards."""
    info = named("jax._src.stages.ArgInfo") + b")\x81"
    filled = info + b"]\x94b"
    pickled.check(b"\x80\x04" + filled + b".")
    with pytest.raises(StoreError, match="changes what it has used"):
        pickled.check(b"\x80\x04" + filled + b"h\x00" + info + b"Nb" + b"a\x86.")


def test_bytes_after_the_end():
    """Nothing follows an executable."""
    with pytest.raises(StoreError, match="after its end"):
        pickled.check(pickle.dumps(None) + b"N.")


ATTACK = """
    import pickle, sys
    import jax
    from cudagraph_jax import StoreError
    from cudagraph_jax.xla import serialize as serial
    from tests.xla.test_unpickle import ATTACKS, text
    before = set(sys.modules)
    {before}
    try:
        serial.load(b"\\x80\\x04" + {data} + b".", inputs=jax.tree.structure(1),
                    outputs=jax.tree.structure(1), devices=jax.devices())
    except StoreError as error:
        print(error)
    print("lives on, and has imported", {{name for name in set(sys.modules) - before
                                          if name.startswith(("numpy.f2py", "jax.exp"))}})
"""


@pytest.mark.parametrize("attack", ["runs a module", "imports a module", "bytes as pointers"])
def test_a_process_outlives_an_attack(attack):
    """What would end the process, by an exit or by reading memory, is an error of the store."""
    said = said_by(ATTACK.format(before="", data=f"ATTACKS[{attack!r}]"))
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
    assert "EXT1" in said
    assert not path.exists()


def test_a_new_process_has_imported_all_that_is_named():
    """Reading an executable in a process that has compiled nothing imports no module."""
    program = """
        import importlib.util, sys
        import cudagraph_jax
        from cudagraph_jax.xla import unpickle
        named = {*unpickle.CALLED, *unpickle.FILLED, *unpickle.PASSED}
        modules = {path.rpartition(".")[0] for path in named} - set(sys.modules)
        print({module for module in modules if importlib.util.find_spec(module)})
    """
    assert said_by(program) == "set()\n"
