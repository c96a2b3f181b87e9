import os
import pickle

import numpy as np
import pytest

from tangentlab.data.inert import as_array, read_pickle
from tangentlab.errors import DataError

VALUES = np.arange(12, dtype=np.uint8).reshape(3, 4) + 200


@pytest.fixture
def write(tmp_path):
    path = tmp_path / "batch"

    def write(content):
        path.write_bytes(content)
        return path

    return write


class Run:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_reads_python_2_pickles(write, authors):
    batch = read_pickle(write(authors.pickled({b"data": VALUES, b"labels": [3, 1], b"name": b"\xe9"})))
    assert batch["labels"] == [3, 1]
    assert batch["name"] == b"\xe9"
    assert np.array_equal(as_array(batch["data"], "batch"), VALUES)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("values", [VALUES, np.asfortranarray(VALUES), VALUES[:, ::2]])
def test_reads_arrays_of_this_numpy(write, protocol, values):
    path = write(pickle.dumps({b"data": values, "labels": [1]}, protocol))
    batch = read_pickle(path)
    assert np.array_equal(as_array(batch["data"], path), values)
    assert batch["labels"] == [1]


def test_numpy_is_not_called_while_reading(write, monkeypatch):
    path = write(pickle.dumps({"data": VALUES}, 2))

    def never(*args):
        raise AssertionError("NumPy was called")

    monkeypatch.setattr("numpy._core.multiarray._reconstruct", never)
    monkeypatch.setattr(np, "dtype", never)
    assert list(read_pickle(path)) == ["data"]


NESTED = {
    "alone": lambda evil: evil,
    "value": lambda evil: {"data": VALUES, "labels": [1, {"deep": (evil,)}]},
    "key": lambda evil: {(1, evil): 2},
    "argument": lambda evil: {"data": Run(np.dtype, evil)},
    "state": lambda evil: {"data": Stated(evil)},
}


class Stated:
    def __init__(self, state):
        self.state = state

    def __reduce__(self):
        return np.dtype, ("u1",), self.state


@pytest.mark.parametrize("place", NESTED)
@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_malicious_pickle_runs_nothing(write, tmp_path, place, protocol):
    mark = tmp_path / "executed"
    path = write(pickle.dumps(NESTED[place](Run(os.system, f"touch {mark}")), protocol))
    with pytest.raises(DataError, match=rf"{path} asks for {os.system.__module__}\.system, .* not run"):
        read_pickle(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("function", "args"),
    [
        (eval, ("1",)),
        (getattr, ("", "join")),
        (np.load, ("x",)),
        (np.frombuffer, (b"12",)),
        (pickle.loads, (b"N.",)),
        (bytearray, (b"1",)),
    ],
)
def test_other_globals_are_refused_even_those_of_numpy(write, function, args):
    path = write(pickle.dumps({"data": Run(function, *args)}, 4))
    with pytest.raises(DataError, match="which no data needs"):
        read_pickle(path)


def test_dotted_names_do_not_reach_through_an_allowed_one(write):
    path = write(b"\x80\x04\x8c\x05numpy\x8c\x0cndarray.dump\x93.")
    with pytest.raises(DataError, match=r"asks for numpy\.ndarray\.dump"):
        read_pickle(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02}U\x01aPfile\ns.", "outside object"),
        (b"\x80\x02}(U\x01aU\x04fileQu.", "outside object"),
        (b"\x80\x02}U\x01a\x82\x01s.", "extension code"),
    ],
)
def test_persistent_ids_and_extension_codes_are_refused(write, content, message):
    with pytest.raises(DataError, match=message):
        read_pickle(write(content))


def test_stand_ins_cannot_be_changed_for_the_next_file(write, authors):
    # BUILD with (None, {...}) sets attributes on what is below it, here on the stand-in of ndarray
    state = b"N}(U\x08__call__NU\x04nameU\x01xu\x86b"
    with pytest.raises(DataError, match="not a readable pickle"):
        read_pickle(write(b"\x80\x02}U\x01acnumpy\nndarray\n" + state + b"s."))
    path = write(authors.pickled({b"data": VALUES}))
    assert np.array_equal(as_array(read_pickle(path)["data"], path), VALUES)


def test_a_truncated_pickle_is_named(write, authors):
    whole = authors.pickled({b"data": VALUES, b"labels": [1, 2, 3]})
    for length in range(len(whole)):
        path = write(whole[:length])
        with pytest.raises(DataError, match=f"{path} is not a readable pickle"):
            read_pickle(path)


def test_only_dictionaries_are_taken(write):
    with pytest.raises(DataError, match="holds a list; expected a dictionary"):
        read_pickle(write(pickle.dumps([1])))


U1 = b"cnumpy\ndtype\nU\x02u1\x85R"
I1 = b"cnumpy\ndtype\nU\x02i1\x85R"


def frombuffer(content=b"U\x02ab", dtype=U1, shape=b"K\x02\x85"):
    return b"cnumpy.core.numeric\n_frombuffer\n(" + content + dtype + shape + b"U\x01CtR"


@pytest.mark.parametrize(
    "record",
    [
        b"U\x03abc",
        b"cnumpy\nndarray\n",
        U1,
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n\x85R",  # no state
        b"cnumpy.core.multiarray\n_reconstruct\n)R",
        b"cnumpy.core.numeric\n_frombuffer\n)R",
        frombuffer(shape=b"K\x03\x85"),
        frombuffer(shape=b"J\xff\xff\xff\xffJ\xfe\xff\xff\xff\x86"),  # (-1, -2), whose product fits
        frombuffer(shape=b"N"),
        frombuffer(dtype=I1),
        frombuffer(dtype=b"U\x02u1"),
        frombuffer(content=b"K\x07"),
    ],
)
def test_records_that_are_no_array_are_refused(write, record):
    path = write(b"\x80\x02}U\x04data" + record + b"s.")
    with pytest.raises(DataError, match="batch holds a damaged array"):
        as_array(read_pickle(path)["data"], path)


def test_the_records_above_differ_from_a_good_one(write):
    path = write(b"\x80\x02}U\x04data" + frombuffer() + b"s.")
    assert as_array(read_pickle(path)["data"], path).tolist() == [97, 98]


def test_other_types_of_values_are_refused(write):
    path = write(pickle.dumps({"data": VALUES.astype(np.float32)}, 2))
    with pytest.raises(DataError, match=r"damaged array: its values are 'f4', expected 'u1'"):
        as_array(read_pickle(path)["data"], path)
