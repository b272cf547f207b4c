from __future__ import annotations

import http.server
import os
import pickle
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from zenith_det.errors import CheckpointError
from zenith_det.training.checkpoints.checkpoint import Checkpointer
from zenith_det.training.checkpoints.reading import read_pickle
from zenith_det.training.checkpoints.weights import load_model_weights, read_weights, strip_prefixes


class RunsCode:
    def __init__(self, function: object, *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> object:
        return self.call


def one_line(error: pytest.ExceptionInfo[CheckpointError]) -> str:
    text = str(error.value)
    assert text
    assert "\n" not in text
    return text


def model(classes: int = 3) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(3, 4, 3),
            norm=nn.BatchNorm2d(4),
            body=nn.Conv2d(4, 4, 1),
            head=nn.Linear(4, classes),
        )
    )


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))


# --- where weights come from -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"model": s, "iteration": 3}, lambda s: {"state_dict": s}]
)
def test_pth_files_of_each_layout(tmp_path: Path, wrap: Callable[[dict], dict]) -> None:
    torch.save(wrap(model().state_dict()), tmp_path / "w.pth")
    assert list(read_weights(str(tmp_path / "w.pth"))) == list(model().state_dict())
    assert list(read_weights(f"file://{tmp_path}/w.pth")) == list(model().state_dict())


def zoo(protocol: int) -> bytes:
    weights = {
        "conv.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        "big_endian": np.arange(3, dtype=">f4"),
        "half": np.ones(2, np.float16),
        "count": np.array(7),
        "empty": np.zeros((0, 4), np.float32),
    }
    extra = {"__author__": "Someone", "matching_heuristics": True}
    extra |= {"scale": np.float64(0.5), "raw": b"\x00\xff"}
    return pickle.dumps({"model": OrderedDict(weights), **extra}, protocol=protocol)


@pytest.mark.parametrize("protocol", range(6))
def test_model_zoo_pickles_of_each_protocol(tmp_path: Path, protocol: int) -> None:
    (tmp_path / "w.pkl").write_bytes(zoo(protocol))
    data = read_pickle(tmp_path / "w.pkl")
    assert data["__author__"] == "Someone"
    assert data["scale"] == 0.5
    assert data["raw"] == b"\x00\xff"
    tensors = read_weights(str(tmp_path / "w.pkl"))
    assert tensors["conv.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert tensors["fortran"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert tensors["big_endian"].tolist() == [0, 1, 2]
    assert tensors["half"].dtype == torch.float16
    assert tensors["count"].item() == 7
    assert tensors["empty"].shape == (0, 4)
    tensors["conv.weight"].add_(1)  # memory of its own


def test_names_of_either_numpy_generation_are_known(tmp_path: Path) -> None:
    data = zoo(2)
    other = data.replace(b"numpy._core.", b"numpy.core.")
    if other == data:
        other = data.replace(b"numpy.core.", b"numpy._core.")
    (tmp_path / "w.pkl").write_bytes(other)
    assert read_weights(str(tmp_path / "w.pkl"))["conv.weight"].shape == (2, 3)


def test_a_pickle_of_python_2_with_detectron1_blobs(tmp_path: Path) -> None:
    raw = np.array([1.5, -2.0], "<f4").tobytes()
    # What Python 2's pickle writes: byte strings (U, T) where Python 3 writes unicode and bytes.
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntU\x01btR(I1\n(L2L\nt"
        + b"cnumpy\ndtype\n(U\x02f4I0\nI1\ntR(I3\nU\x01<NNNI-1\nI-1\nI0\ntbI00\n"
        + b"T" + struct.pack("<i", len(raw)) + raw + b"tb"
    )  # fmt: skip
    pickled = b"}U\x05blobs}(U\x07conv1_w" + array + b"U\x10conv1_w_momentum" + array + b"us."
    (tmp_path / "w.pkl").write_bytes(pickled)
    tensors = read_weights(str(tmp_path / "w.pkl"))
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {"conv1_w": [1.5, -2.0]}


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize(
    "wrap",
    [lambda bad: bad, lambda bad: {"model": {"w": bad}}, lambda bad: {"model": [np.zeros(2), (1, [bad])]},
     lambda bad: np.array([bad], dtype=object)],
    ids=["bare", "value", "nested", "object-array"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["system", "eval", "getattr", "popen"])
def test_a_pickle_with_code_runs_nothing(
    tmp_path: Path, protocol: int, wrap: Callable[[object], object], kind: str
) -> None:
    import subprocess

    witness = tmp_path / "ran"
    touch = f"open({str(witness)!r}, 'w')"
    bad = {
        "system": RunsCode(os.system, f"touch {witness}"),
        "eval": RunsCode(eval, touch),
        "getattr": RunsCode(getattr, RunsCode(__import__, "os"), "system"),
        "popen": RunsCode(subprocess.Popen, ["touch", str(witness)]),
    }[kind]
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(wrap(bad), protocol=protocol))
    with pytest.raises(CheckpointError) as error:
        read_weights(str(tmp_path / "w.pkl"))
    one_line(error)
    assert not witness.exists()


def test_the_refusal_names_the_code_and_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"model": RunsCode(eval, "1")}))
    with pytest.raises(CheckpointError, match=r"refused.*'builtins\.eval'.*torch\.save"):
        read_weights(str(tmp_path / "w.pkl"))


def shared(kind: Callable[[list], object], depth: int = 40) -> object:
    value: object = kind([0] * 10)
    for _ in range(depth):
        value = kind([value] * 10)
    return value


@pytest.mark.parametrize(
    "pickled",
    [
        # Each would take memory or time without bound in an ordinary unpickler.
        b"\x80\x02]r\xff\xff\xff\x7f.",  # a memo index of two milliards
        pickle.dumps({"model": shared(list)}),  # ten to the power of forty, if written out
        pickle.dumps({"model": {"w": shared(tuple)}}),
        b"\x80\x04(K\x01K\x01\x86\x94" + b"h\x00h\x00\x86\x94" * 3 + b"K\x01d.",
        b"\x80\x02cbuiltins\nbytes\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R.",  # bytes(2**40)
        b"\x80\x02cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85"
        b"U\x01b\x87R.",
        b"\x80\x04\x8d\x00\x00\x00\x00\x00\x00\x00\x01abc.",  # a text of 2**56 bytes
        b"]" * 100_000 + b"a" * 99_999 + b".",  # a hundred thousand deep
        b"\x80\x02cnumpy\ndtype\nU\x02f4\x85R}U\x05valueK\x01sb.",  # attributes set on what is no instance
        b"\x80\x02ccollections\nOrderedDict\n}U\x08fromkeysK\x01sb.",
        b"\x80\x02ccollections\nOrderedDict\n)\x81.",
        b"Pwhatever\n.",
        b"",
        b"\x80\x02",
        b"hello, this is no pickle",
        pickle.dumps([1, 2]),
        pickle.dumps({"model": {}}),
        pickle.dumps({"model": {"w": np.array(["text"])}}),
    ],
)
def test_hostile_and_broken_pickles_end_in_one_line(tmp_path: Path, pickled: bytes) -> None:
    (tmp_path / "w.pkl").write_bytes(pickled)
    with pytest.raises(CheckpointError, match=r"w\.pkl") as error:
        read_weights(str(tmp_path / "w.pkl"))
    assert len(one_line(error)) < 1000


def test_every_truncation_of_a_pickle_is_told(tmp_path: Path) -> None:
    for protocol in (2, 5):
        whole = zoo(protocol)
        for size in range(0, len(whole), 7):
            (tmp_path / "w.pkl").write_bytes(whole[:size])
            with pytest.raises(CheckpointError, match=r"w\.pkl"):
                read_weights(str(tmp_path / "w.pkl"))


def test_missing_and_foreign_names(tmp_path: Path) -> None:
    for name, reason in {
        str(tmp_path / "absent.pth"): "does not exist",
        "s3://bucket/w.pth": "cannot read s3:// names",
        "https://example.com/": "not the address of a file",
        "detectron2://../../etc/passwd": "not the address of a file",
        "https://example.com/a/%2e%2e/%2e%2e/x.pth": "not the address of a file",
    }.items():
        with pytest.raises(CheckpointError, match=reason) as error:
            read_weights(name)
        assert name in one_line(error)


# --- fetching --------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "iopath"))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    requests: list[str] = []
    content = zoo(2)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            if "absent" in self.path:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:100] if "torn" in self.path else content)

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        thread = threading.Thread(target=http_server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http_server.server_port}", requests
        http_server.shutdown()
        thread.join()


def test_a_url_is_fetched_once(cache: Path, server: tuple[str, list[str]]) -> None:
    url, requests = server
    for _ in range(2):
        assert read_weights(f"{url}/zoo/model_final_f10217.pkl?x=1")["conv.weight"].shape == (2, 3)
    assert requests == ["/zoo/model_final_f10217.pkl"]
    assert (cache / "127.0.0.1" / "zoo" / "model_final_f10217.pkl").is_file()


@pytest.mark.parametrize(("path", "reason"), [("absent.pkl", "404"), ("torn.pkl", "broke after 100 of")])
def test_a_failed_fetch_leaves_nothing(
    cache: Path, server: tuple[str, list[str]], path: str, reason: str
) -> None:
    with pytest.raises(CheckpointError, match=reason) as error:
        read_weights(f"{server[0]}/{path}")
    one_line(error)
    assert [file for file in cache.rglob("*") if file.is_file()] == []


def test_without_a_network_one_line_says_what_why_and_what_to_do(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    def no_name(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", no_name)
    name = "detectron2://COCO-Detection/faster_rcnn_R_50_FPN_1x/137257794/model_final_b275ba.pkl"
    with pytest.raises(CheckpointError) as error:
        read_weights(name, timeout=2)
    text = one_line(error)
    assert name in text
    assert "https://dl.fbaipublicfiles.com/detectron2/COCO-Detection/" in text
    assert "no network" in text
    assert str(cache / "dl.fbaipublicfiles.com" / "detectron2" / "COCO-Detection") in text


def test_a_server_that_refuses_is_told(cache: Path) -> None:
    with pytest.raises(CheckpointError, match="refused"):
        read_weights("http://127.0.0.1:9/w.pkl", timeout=2)


def test_what_was_put_by_hand_or_fetched_by_detectron2_is_taken(cache: Path, tmp_path: Path) -> None:
    for place in (
        cache / "dl.fbaipublicfiles.com" / "detectron2" / "ImageNetPretrained" / "MSRA" / "R-50.pkl",
        tmp_path / "iopath" / "detectron2" / "ImageNetPretrained" / "MSRA" / "R-50.pkl",
    ):
        place.parent.mkdir(parents=True)
        place.write_bytes(zoo(2))
        assert "conv.weight" in read_weights("detectron2://ImageNetPretrained/MSRA/R-50.pkl")
        place.unlink()


# --- into a model ----------------------------------------------------------------------------------------


def test_prefixes_of_wrappers_are_dropped() -> None:
    one = torch.zeros(1)
    assert list(strip_prefixes({"module._orig_mod.a.w": one, "module._orig_mod.b": one})) == ["a.w", "b"]
    assert list(strip_prefixes({"_orig_mod.module.a": one})) == ["a"]
    assert list(strip_prefixes({"backbone._orig_mod.a": one, "head": one})) == ["backbone.a", "head"]
    # A model's own part that happens to be called so.
    assert list(strip_prefixes({"module.a": one, "head": one})) == ["module.a", "head"]
    assert strip_prefixes({}) == {}
    with pytest.raises(CheckpointError, match="same name"):
        strip_prefixes({"_orig_mod.a": one, "a": one})


def test_plain_and_wrapped_models_load_into_each_other(tmp_path: Path) -> None:
    def compiled(plain: nn.Module) -> nn.Module:
        return torch.compile(plain)  # type: ignore[return-value]

    wrappers = [lambda m: m, nn.DataParallel, compiled, lambda m: nn.DataParallel(compiled(m))]
    for wrap_from in wrappers:
        source = model()
        path = Checkpointer(tmp_path).save("model_final", {"model": wrap_from(source).state_dict()})
        for wrap_to in wrappers:
            target = model()
            report = load_model_weights(wrap_to(target), read_weights(str(path)), require_all=True)
            assert same(source, target)
            assert len(report.matched) == 11
            assert (report.missing, report.unexpected, report.mismatched) == ((), (), {})


def test_the_summary_counts() -> None:
    weights = dict(model().state_dict())
    report = load_model_weights(model(), weights, source="x.pth")
    assert report.summary() == "weights: loaded 11/11 tensors from x.pth"
    del weights["head.bias"]
    weights["fc.weight"] = torch.zeros(1)
    report = load_model_weights(model(), weights, source="x.pth")
    assert report.summary() == (
        "weights: loaded 10/11 tensors from x.pth; 1 not in the file (head.bias); "
        "1 of the file not used (fc.weight)"
    )


def test_a_backbone_fills_its_part() -> None:
    parts = {"backbone": model(), "a": nn.Linear(2, 2), "b": model(), "c": model(), "d": model()}
    target = nn.ModuleDict(parts)
    weights = {f"backbone.{name}": tensor for name, tensor in model().state_dict().items()}
    weights |= {f"fc{i}": torch.zeros(1) for i in range(3)}
    report = load_model_weights(target, weights)
    assert len(report.matched) == 11
    assert len(report.missing) == 35


def test_another_models_weights_are_refused() -> None:
    other = {f"features.{i}.weight": torch.zeros(2) for i in range(30)}
    for weights in (other, other | {"conv.weight": model().state_dict()["conv.weight"]}):
        with pytest.raises(CheckpointError, match="weights of another model") as error:
            load_model_weights(model(), weights, source="vgg.pth")
        assert "features.0.weight" in one_line(error)
    with pytest.raises(CheckpointError, match="weights of another model"):
        load_model_weights(model(), other, allow_mismatch=True)


def test_heads_of_another_number_of_classes_are_named_and_the_rest_can_be_loaded() -> None:
    source, target = model(classes=80), model(classes=3)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load_model_weights(target, source.state_dict(), source="coco.pth")
    text = one_line(error)
    assert "head.weight [80, 4] in the file, [3, 4] in the model" in text
    assert "To load the other 9: MODEL.WEIGHTS_ALLOW_MISMATCH True" in text
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())
    report = load_model_weights(target, source.state_dict(), allow_mismatch=True)
    assert report.mismatched == {"head.weight": ((80, 4), (3, 4)), "head.bias": ((80,), (3,))}
    assert "2 of another shape (head.weight, head.bias)" in report.summary()
    assert torch.equal(target.conv.weight, source.conv.weight)
    assert torch.equal(target.head.weight, before["head.weight"])


def test_where_all_are_needed_a_missing_one_is_an_error() -> None:
    weights = dict(model().state_dict())
    del weights["norm.num_batches_tracked"]  # older files lack it; nothing depends on it
    load_model_weights(model(), weights, require_all=True)
    del weights["head.bias"]
    with pytest.raises(CheckpointError, match=r"1 of the model's 11 tensors are not in it: head\.bias"):
        load_model_weights(model(), weights, require_all=True)
    with pytest.raises(CheckpointError, match=r"head\.weight"):
        load_model_weights(model(4), model(3).state_dict(), require_all=True, allow_mismatch=True)
