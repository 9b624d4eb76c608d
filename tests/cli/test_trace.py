"""Request sizes out of CSV and JSON lines."""

import csv
import io
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cudagraph_jax import ConfigError, CUDAGraphError
from cudagraph_jax.cli.trace import LARGEST_SIZE, read_sizes

LENGTH = ("len",)
PAIRS = ("batch", "len")


@pytest.fixture
def written(tmp_path):
    """Writes a trace and gives its path."""

    def write(content, name="trace.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def refusal(source, columns=LENGTH):
    """What is said against a trace, without the file's name."""
    with pytest.raises(ConfigError) as caught:
        read_sizes(source, columns)
    message = str(caught.value)
    assert "\n" not in message
    assert source in message
    return message.replace(source, "TRACE")


def test_lengths(written):
    """One column gives the lengths, in the order of the rows."""
    sizes = read_sizes(written("time,len\n1,30\n2,10\n3,20\n"), LENGTH)
    assert sizes.dtype == np.int64
    assert sizes.tolist() == [30, 10, 20]


def test_pairs(written):
    """Two columns give (batch, seq_len), whatever their order in the file."""
    assert read_sizes(written("len,batch\n30,1\n10,2\n"), PAIRS).tolist() == [[1, 30], [2, 10]]


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.ndjson", "TRACE.JSONL"])
def test_json_lines(written, name):
    """An object in each line gives the same."""
    lines = '{"len": 30, "batch": 1, "x": [1]}\n{"batch": 2.0, "len": "10"}\n'
    assert read_sizes(written(lines, name), PAIRS).tolist() == [[1, 30], [2, 10]]


def test_long_numbers_elsewhere(written):
    """A number of thousands of digits in another field is no obstacle."""
    lines = '{"id": ' + "9" * 5000 + ', "len": 30}\n'
    assert read_sizes(written(lines, "trace.jsonl"), LENGTH).tolist() == [30]


def test_standard_input():
    """A dash reads CSV from the standard input, and leaves it open."""
    stdin = io.BytesIO(b"len\n3\n4\n")
    assert read_sizes("-", LENGTH, stdin=stdin).tolist() == [3, 4]
    assert not stdin.closed
    with pytest.raises(ConfigError, match=r"^the standard input: line 2: len='x'"):
        read_sizes("-", LENGTH, stdin=io.BytesIO(b"len\nx\n"))


sizes_strategy = st.lists(st.tuples(st.integers(1, LARGEST_SIZE), st.integers(1, 99)), min_size=1)


@given(sizes_strategy, st.text(max_size=20).filter(lambda text: "\0" not in text))
def test_what_is_written_is_read(sizes, other):
    """Whatever stands beside them, quoted newlines included, the sizes are those written."""
    # Lone carriage returns and surrogates are no text that a file would hold.
    other = other.encode("utf-8", "ignore").decode()
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(["note", "len", "batch"])
    writer.writerows([other, length, batch] for length, batch in sizes)
    content = file.getvalue().encode()
    expected = [[batch, length] for length, batch in sizes]
    assert read_sizes("-", PAIRS, stdin=io.BytesIO(content)).tolist() == expected


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbflen,b\r\n7,1\r\n",
        b"len,b\r7,1\r",
        b"\nlen,b\n\n7,1\n\n",
        b" len , b\n 7 ,1",
        b'b,len\n"a\nb",7\n',
        b"len,b\n7.0,1\n",
        b'len,b\n7,"' + b"a prompt " * 50_000 + b'"\n',
    ],
    ids=["mark and CRLF", "CR", "empty lines", "spaces", "quoted newline", "float", "long cell"],
)
def test_forms(written, content):
    """A byte-order mark, any line end, empty lines, spaces, quotes and long cells do not matter."""
    assert read_sizes(written(content), LENGTH).tolist() == [7]


def test_cell_limit_is_restored(written):
    """Reading changes no setting of the csv module."""
    before = csv.field_size_limit()
    read_sizes(written("len\n7\n"), LENGTH)
    refusal(written("len\n"))
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("abc", "line 3: len='abc' is no whole number of 1 or more"),
        ("0", "line 3: len='0' is no whole number of 1 or more"),
        ("-4", "line 3: len='-4' is no whole number of 1 or more"),
        ("1.5", "line 3: len='1.5' is no whole number of 1 or more"),
        ("nan", "line 3: len='nan' is no whole number of 1 or more"),
        ("inf", "line 3: len='inf' is no whole number of 1 or more"),
        ('""', "line 3: len is blank: leave the row out"),
        ("  ", "line 3: len is blank: leave the row out"),
        ("1700000000000", "is above 10,000,000: is this the column of the sizes?"),
        ("9" * 5000, "is above 10,000,000"),
        ("1e400", "is above 10,000,000"),
        ("-" + "9" * 5000, "is no whole number of 1 or more"),
        ("1_000", "line 3: len='1_000' is no whole number of 1 or more"),
        ("1_0.0", "line 3: len='1_0.0' is no whole number of 1 or more"),
        ("\u0663", "line 3: len='\u0663' is no whole number of 1 or more"),
    ],
)
def test_cells(written, cell, expected):
    """What is no size is told with its line."""
    assert expected in refusal(written(f"len,b\n5,1\n{cell},1\n"))


def test_line_numbers(written):
    """A line is counted as an editor does, also behind quoted newlines and empty lines."""
    text = 'note,len\n"a\nb",5\n\n"c\nd\ne",x\n'
    assert "line 5: len='x'" in refusal(written(text))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "the file is empty: expected a header line and a row for each request"),
        (b"\n\n", "the file is empty"),
        (b"len,b\n", "holds no rows: expected one for each request"),
        (b"lenn,b\n1,2\n", "there is no column 'len': did you mean 'lenn'? (lenn, b)"),
        (
            b"7,12\n8,9\n",
            "'7,12', holds numbers and no names of columns: put a header above it",
        ),
        (b"x,y\n1,2\n", "there is no column 'len': choose one of x, y"),
        (b"len,len\n1,2\n", "the header has 'len' more than once"),
        (b"len,b\n1,2\n3\n", "line 3 has 1 cells, but the header has 2"),
        (b"len,b\n1,2\n3,4,5\n", "line 3 has 3 cells, but the header has 2"),
        (b'len,b\n1,2\n3,"4\n', "line 3 is no CSV: unexpected end of data"),
        (b"len\n\xff\n", "is not UTF-8 (invalid start byte): convert it first"),
        ("len\n5\n".encode("utf-16"), "is not UTF-8"),
    ],
)
def test_tables(written, content, expected):
    """A file that is no table of requests is told by what it lacks."""
    assert expected in refusal(written(content))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"len": ', "line 2 is no JSON: Expecting value, at column 8"),
        ("[1]", 'line 2 is no JSON object: expected one for each request, such as {"len": 374}'),
        ("7", "line 2 is no JSON object"),
        ('{"lem": 5}', "line 2 has no 'len': did you mean 'lem'? (lem)"),
        ('{"len": null}', "line 2: len is blank"),
        ('{"len": true}', "line 2: len=True is no whole number"),
        ('{"len": [5]}', "line 2: len=[5] is no whole number"),
        ('{"len": NaN}', "line 2: len=nan is no whole number"),
        ('{"len": 0}', "line 2: len=0 is no whole number"),
        ('{"len": ' + "9" * 5000 + "}", "line 2: len=inf is above 10,000,000"),
        ('{"len": "1_000"}', "line 2: len='1_000' is no whole number"),
        ("[" * 100_000, "line 2 is no JSON"),
    ],
)
def test_json_rows(written, line, expected):
    """A line that holds no request is told by its number."""
    assert expected in refusal(written('{"len": 5}\n' + line + "\n", "trace.jsonl"))


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_no_json_rows(written, content):
    """A file without objects holds no rows."""
    assert "holds no rows" in refusal(written(content, "trace.jsonl"))


def test_paths(tmp_path):
    """What cannot be opened, or has another suffix, is told at once."""
    remedy = "name a file that is there and that you may read"
    missing = refusal(str(tmp_path / "a.csv"))
    assert missing == f"TRACE cannot be read: No such file or directory; {remedy}"
    (tmp_path / "b.csv").mkdir()
    assert refusal(str(tmp_path / "b.csv")) == f"TRACE cannot be read: Is a directory; {remedy}"
    assert "is no .csv, .jsonl or .ndjson file" in refusal(str(tmp_path / "c.parquet"))


def test_errors_are_in_the_tree():
    """Every refusal is one of the package's errors."""
    assert issubclass(ConfigError, CUDAGraphError)


@given(st.binary() | st.lists(st.sampled_from('len,\n7"\r \0')).map("".join).map(str.encode))
def test_any_bytes(content):
    """Whatever a file holds, the sizes are read, or it is refused."""
    with suppress(ConfigError):
        assert (read_sizes("-", LENGTH, stdin=io.BytesIO(b"len,b\n" + content)) >= 1).all()


@pytest.mark.parametrize(("separator", "words"), [(";", "semicolons"), ("\t", "tabs")])
def test_other_separators(tmp_path, separator, words):
    """A file whose columns are separated by something else is told apart from a missing column."""
    trace = tmp_path / "trace.csv"
    trace.write_text(f"a{separator}len\n1{separator}2\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=f"separated by {words}: separate them by commas"):
        read_sizes(str(trace), LENGTH)


def test_sizes_that_come_again(written):
    """What was read once is not read anew, and is told from what only looks like it."""
    cells = ["7", " 7", "7.0", "1e1", "7", "10"] * 3
    assert (
        read_sizes(written("\n".join(["len", *cells])), LENGTH).tolist() == [7, 7, 7, 10, 7, 10] * 3
    )
    assert "line 9: len='7.5' is no whole number" in refusal(
        written("\n".join(["len", *"7777777", "7.5"]))
    )
