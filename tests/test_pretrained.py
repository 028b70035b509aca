"""Published weights: the table, downloads from a server on this machine, options, preprocessing."""

import hashlib
import multiprocessing
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import timm
import torch
from helpers import assert_near, randomise_norms
from safetensors.torch import save_file
from torchvision.models import ResNet18_Weights, ResNet50_Weights, get_model_weights

import backbones
from backbones.classifier import Classifier
from backbones.detection import retinanet
from backbones.pretrained import Published, download
from backbones.weights import WeightsError, load_weights

CONTENT = bytes(range(256)) * 1000
GOOD = f"good-{hashlib.sha256(CONTENT).hexdigest()[:8]}.pth"
# timm's name, ours, the name of the weights.
TIMM = [
    ("cspdarknet53", "cspdarknet53", "timm.ra_in1k"),
    ("darknet53", "darknet53", "timm.c2ns_in1k"),
    ("ese_vovnet39b", "vovnet39", "timm.ra_in1k"),
    ("ese_vovnet57b", "vovnet57", "timm.ra4_e3600_r256_in1k"),
]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of torch.hub."""
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    return tmp_path / "checkpoints"


@pytest.fixture
def server(cache, monkeypatch):
    """Serves CONTENT, half of it for "cut", 404 for "missing"; `requests` counts the answers."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests += 1
            if server.barrier:
                server.barrier.wait(10)
            if "missing" in self.path:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT[: len(CONTENT) // 2] if "cut" in self.path else CONTENT)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.barrier = 0, None
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    row = backbones.list_weights("vovnet19_slim")[0]
    server.row = lambda name: row._replace(url=f"http://127.0.0.1:{server.server_port}/{name}")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def fetch(row):
    assert download(row).read_bytes() == CONTENT


# ---- downloads ---------------------------------------------------------------------------------


def test_a_file_is_downloaded_once(server, cache, capsys):
    for _ in range(2):
        fetch(server.row(GOOD))
    assert server.requests == 1
    assert [path.name for path in cache.iterdir()] == [GOOD]
    assert f"{GOOD}: 100%" in capsys.readouterr().err


def test_a_hash_that_nobody_publishes_is_printed(server, capsys):
    fetch(server.row("model.pth"))
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert f"model.pth: SHA-256 {digest}; none is published" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("good-01234567.pth", r"it has SHA-256 \w+, expected 01234567"),
        ("missing-01234567.pth", "HTTP Error 404: Not Found"),
        ("cut.pth", "it broke off; try again"),  # the server said how many bytes there are
    ],
)
def test_failed_downloads_say_what_to_do_and_leave_nothing(server, cache, name, words):
    row = server.row(name)
    with pytest.raises(WeightsError, match=rf"\({words}\); put {row.url} at {cache / name}"):
        download(row)
    assert list(cache.iterdir()) == []


def test_names_of_other_networks_are_refused():
    for name in ("resnet18", "vovnet39"):
        with pytest.raises(WeightsError, match=r"for this network: (timm|IMAGE)"):
            backbones.create(name, weights=ResNet50_Weights.DEFAULT)
    with pytest.raises(WeightsError, match="this network: IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT"):
        backbones.create("resnet50", weights="IMAGENET1K_V9")


def test_two_processes_at_once(server, cache):
    server.barrier = threading.Barrier(2)  # no answer before both have asked
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fetch, args=(server.row(GOOD),)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
        assert process.exitcode == 0
    assert (server.requests, [path.name for path in cache.iterdir()]) == (2, [GOOD])


def test_a_damaged_file_in_the_cache_is_refused(cache):
    cache.mkdir()
    (cache / "darknet19-2cb641ca.pth").write_bytes(b"damaged")
    with pytest.raises(WeightsError, match=r"expected 2cb641ca .*; if it is damaged, delete it"):
        backbones.create("darknet19", weights="vision_toolbox.in1k")


# ---- options and preprocessing -----------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("theirs", "ours", "name"), TIMM)
def test_a_name_brings_timms_function_and_preprocessing(cache, monkeypatch, theirs, ours, name):
    """With random weights, maps and logits equal timm's; the table's numbers are timm's."""
    monkeypatch.setattr(Published, "sha256", "")
    theirs = randomise_norms(timm.create_model(theirs)).eval()
    (row,) = (row for row in backbones.list_weights(ours) if row.name == name)
    cache.mkdir()
    path = cache / row.file_name
    (save_file if "safetensors" in path.suffix else torch.save)(theirs.state_dict(), path)
    expected, images = [], torch.randn(1, 3, 64, 96)
    for stage in [theirs.stem[1], *theirs.stages] if "vovnet" in ours else theirs.stages:
        stage.register_forward_hook(lambda module, inputs, output: expected.append(output))
    logits = theirs(images)
    net = backbones.create(ours, weights=name).eval()
    assert_near(net(images), expected)
    model = Classifier(net, 1000).eval()
    load_weights(model, name)  # the head too
    torch.testing.assert_close(model(images), logits, rtol=1e-3, atol=1e-3)
    config, used = theirs.pretrained_cfg, net.preprocessing
    assert (used.mean, used.std) == (config["mean"], config["std"])
    assert used.train_px == config["input_size"][-1]
    assert used.test_px == config.get("test_input_size", config["input_size"])[-1]
    assert used.crop_share == config.get("test_crop_pct", config["crop_pct"])
    assert used.interpolation == config["interpolation"]
    hub = f"https://huggingface.co/{config['hf_hub_id']}/resolve/main/model.safetensors"
    assert row.url == (config["url"].replace("huggingface", "rwightman") or hub)


@pytest.mark.parametrize(
    ("backbone", "name", "given", "words"),
    [
        ("cspdarknet53", "timm.ra_in1k", {"act": "mish"}, "act='leaky_relu_0.01'; act='mish' c"),
        ("darknet53", "timm.c2ns_in1k", {"width": 0.5}, "width=1.0; width=0.5 contradicts it"),
    ],
)
def test_a_contradiction_is_one_error_before_any_download(backbone, name, given, words):
    with pytest.raises(ValueError, match=f"^{backbone} with {name} has .*{words}"):
        backbones.create(backbone, weights=name, **given)


def test_other_options_go_along(cache, monkeypatch):
    monkeypatch.setattr(Published, "sha256", "")
    source = backbones.create("vovnet19_slim", slim_channels=128)
    cache.mkdir()
    torch.save(source.state_dict(), cache / "vovnet19_slim_ese-f8075640.pth")
    options = {"out_indices": (2, 3, 4), "in_channels": 1, "slim_channels": 128}
    net = backbones.create("vovnet19_slim", weights="vision_toolbox.ese_in1k", **options)
    assert (net.channels, net.options["slim_channels"]) == ((256, 384, 512), 128)
    assert net.preprocessing == ((0.5,) * 3, (0.5,) * 3, 176, 224, 224 / 232, "bilinear")
    assert net.preprocessing.resize_px == 232
    net = backbones.create("vovnet19_slim", weights="vision_toolbox.ese_in1k")
    assert retinanet(net, 2, out_channels=32).transform.image_mean == (0.5,) * 3
    load_weights(net, source.state_dict())  # not published: nothing is known of its images
    assert net.preprocessing is None


def test_torchvisions_preprocessing(cache, monkeypatch):
    monkeypatch.setattr(Published, "sha256", "")
    cache.mkdir()
    torch.save(backbones.create("resnet18").state_dict(), cache / "resnet18-f37072fd.pth")
    for weights in ("DEFAULT", "IMAGENET1K_V1", ResNet18_Weights.IMAGENET1K_V1):
        used = backbones.create("resnet18", weights=weights).preprocessing
        assert used[:2] == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        assert used[2:] == (None, 224, 224 / 256, "bilinear")
    for row in backbones.list_weights("efficientnet*"):
        images = get_model_weights(row.backbone)[row.name].transforms()
        assert [row.preprocessing.resize_px] == images.resize_size


# ---- the table ---------------------------------------------------------------------------------


def test_the_table_is_readable():
    lines = str(backbones.list_weights("*darknet*")).splitlines()
    assert [line.split()[:4] for line in lines[1:]] == [
        ["cspdarknet53", "timm.ra_in1k", "80.1", "256"],
        ["cspdarknet53", "vision_toolbox.in1k", "77.5", "224"],
        ["darknet19", "vision_toolbox.in1k", "73.5", "224"],
        ["darknet53", "timm.c2ns_in1k", "80.5", "288"],
        ["darknet53", "vision_toolbox.in1k", "76.9", "224"],
    ]
    assert "layout=darknet act=leaky_relu_0.01  apache-2.0  cspdarknet53_ra_256-d05c" in lines[1]
    assert len(backbones.list_weights()) == 44
    assert len(str(backbones.list_weights("none"))) > 0


def test_every_row_fits_its_network():
    """Its options build the network; hashes are those in the names; files have different names."""
    rows = backbones.list_weights()
    assert len({row.file_name for row in rows}) == len(rows)
    assert [row.backbone for row in rows if not row.sha256] == ["vovnet39", "vovnet57"]
    for row in rows:
        assert row.sha256 in row.url
        if row.options:
            with torch.device("meta"):
                net = backbones.create(row.backbone, **row.options)
            assert row.options.items() <= net.options.items()
