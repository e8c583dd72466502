"""The settings of bulk runs, conditions by index, ranks and devices, and the command."""

import os
import runpy
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff import factories
from fastdiff.bulk import Job, __main__, engine, settings
from fastdiff.bulk.conditions import cycle, random_classes, value
from fastdiff.bulk.folder import Folder
from fastdiff.bulk.settings import load
from fastdiff.noise import mix64

ROOT = os.path.dirname(os.path.dirname(fastdiff.__file__))

NETS = """
import sys
import torch
import fastdiff

argv = list(sys.argv)
calls = []

class Net(torch.nn.Module):
    def __init__(self, scale=0.5):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(float(scale)))

    def forward(self, x, t, **conditions):
        return self.scale * x

def network(scale=0.5):
    calls.append(scale)
    return Net(scale).eval()

def function(**arguments):
    return lambda x, t, **conditions: 0.5 * x

def on(device, *, scale=1.0):
    calls.append((device, scale))
    return lambda x, t: scale * x

def required(checkpoint):
    return Net().eval()

def pair():
    return Net().eval(), Net(2.0).eval()

def training():
    return Net()

def three():
    return 1, 2, 3

def nothing():
    pass

def raises():
    raise ArithmeticError("in the factory")

def network_raises():
    def network(x, t):
        raise ValueError("in the network")
    return network

def interrupted():
    def network(x, t):
        raise KeyboardInterrupt
    return network

def nan():
    return lambda x, t: x * float("nan")

def sampler():
    return fastdiff.DDPMSampler(fastdiff.NoiseSchedule.linear(50), 4)

number = 3
"""

RUN = """
samples = 40
shape = [1, 4, 4]
batch = 8
network = "nets:network"

[schedule]
type = "cosine"
num_timesteps = 100

[sampler]
type = "ddim"
steps = 4
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with a module of factories and a file of settings."""
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "broken.py").write_text("import a_package_that_is_not_there\n")
    (tmp_path / "run.toml").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def written(folder, text, name="other.toml"):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(textwrap.dedent(text))
    return name


def same_samplers(a, b):
    assert type(a) is type(b) and a.timesteps == b.timesteps
    assert torch.equal(a.table.rows, b.table.rows)
    return True


# Settings


def test_the_smallest_file(folder):
    loaded = load("run.toml")
    job = loaded.job
    assert isinstance(job, Job) and (job.samples, job.shape, job.batch, job.seed) == (40, (1, 4, 4), 8, 0)
    assert same_samplers(job.sampler, fastdiff.DDIMSampler(fastdiff.NoiseSchedule.cosine(100), 4))
    assert (job.conditions, job.guidance_scale, job.uncond) == (None, None, None)
    assert (job.dtype, job.store, job.threads, job.name) == (torch.float32, "state", 1, "nets:network")
    assert (loaded.out, loaded.device, loaded.inexact) == (None, None, False)
    assert load(Path("run.toml")).job.identity == job.identity


def test_every_key(folder):
    np.save(folder / "rows.npy", np.arange(120, dtype=np.float32).reshape(60, 2))
    name = written(
        folder,
        """
        samples = 50
        shape = [3, 2]
        out = "there"
        seed = -7
        batch = 5
        chunk = 10
        dtype = "bfloat16"
        store = "uint8"
        threads = 2
        device = "cpu"
        inexact = true

        [network]
        factory = "nets:function"
        arguments = { path = "ema.pt", depth = 3 }

        [schedule]
        type = "linear"
        num_timesteps = 200
        beta_start = 1e-4
        beta_end = 0.01
        rescale_zero_snr = true

        [sampler]
        type = "ddpm"
        steps = [150, 100, 0]
        prediction = "v"
        variance = "fixed_large"
        clip = "none"

        [conditions]
        y = { cycle = 10 }
        z = { random = 7, seed = 3 }
        w = 2.5
        u = { value = [1, 2] }
        rows = { file = "rows.npy" }

        [guidance]
        scale = 2
        uncond = { y = 10, rows = { value = [0.0, 0.0] } }
        """,
    )
    loaded = load(name)
    job = loaded.job
    schedule = fastdiff.NoiseSchedule.linear(200, 1e-4, 0.01).rescale_zero_snr()
    sampler = fastdiff.DDPMSampler(schedule, [150, 100, 0], prediction="v", variance="fixed_large", clip=None)
    assert same_samplers(job.sampler, sampler)
    assert (job.samples, job.shape, job.seed, job.batch, job.chunk) == (50, (3, 2), -7, 5, 10)
    assert (job.dtype, job.store, job.threads) == (torch.bfloat16, "uint8", 2)
    assert (loaded.out, loaded.device, loaded.inexact) == (Path("there"), "cpu", True)
    assert job.name == "nets:function(depth=3, path='ema.pt')"
    assert isinstance(job.conditions["rows"], np.ndarray) and job.conditions["rows"].shape == (50, 2)
    others = {name: condition for name, condition in job.conditions.items() if name != "rows"}
    assert others == {"y": cycle(10), "z": random_classes(7, 3), "w": value(2.5), "u": value([1, 2])}
    assert job.guidance_scale == 2 and job.uncond == {"y": value(10), "rows": value([0.0, 0.0])}
    indices = torch.tensor([49, 0])
    assert torch.equal(job.conditions_of(indices)["rows"], torch.tensor([[98.0, 99.0], [0.0, 1.0]]))


def test_the_example_of_the_docstring(folder):
    np.save(folder / "embeddings.npy", np.zeros((50_000, 2), np.float32))
    lines = settings.__doc__.splitlines()
    example = "\n".join(line for line in lines if line.startswith("    "))
    job = load(written(folder, example)).job
    schedule = fastdiff.NoiseSchedule.cosine(1000).rescale_zero_snr()
    assert same_samplers(job.sampler, fastdiff.DDIMSampler(schedule, 50, prediction="v"))
    assert list(job.conditions) == ["y", "z", "w", "text"] and job.uncond == {"y": value(10)}
    assert job.name == "my_module:network(checkpoint='ema.pt')"


@pytest.mark.parametrize(
    "name", [name for name in settings._schedule_types() if name not in ("warmup", "from_host", "sprite")]
)
def test_every_schedule(folder, name):
    job = load("run.toml", f"schedule.type={name}", "sampler.prediction=v").job
    schedule = getattr(fastdiff.NoiseSchedule, name)(100)
    assert same_samplers(job.sampler, fastdiff.DDIMSampler(schedule, 4, prediction="v"))


def test_schedules_with_arguments_of_their_own(folder):
    made = fastdiff.NoiseSchedule
    job = load("run.toml", "schedule.type=warmup", "schedule.fraction=0.2").job
    assert same_samplers(job.sampler, fastdiff.DDIMSampler(made.warmup(100, 0.2), 4))
    given = (
        'schedule={type="from_host", host="diffusers", betas="scaled_linear", beta_end=0.012, rescale_zero_snr=true}'
    )
    host = made.from_host("diffusers", "scaled_linear", 100, beta_end=0.012, rescale_zero_snr=True)
    job = load("run.toml", given, "sampler.prediction=v").job
    assert same_samplers(job.sampler, fastdiff.DDIMSampler(host, 4, prediction="v"))
    job = load("run.toml", "schedule.type=sprite", 'sampler={type="ddpm", spacing="sprite"}').job
    assert same_samplers(job.sampler, fastdiff.DDPMSampler(made.sprite(100), 4, spacing="sprite"))


def test_later_sources_win(folder):
    written(folder, "seed = 3\n[sampler]\neta = 0.5\n[network]\narguments = { scale = 2.0 }\n")
    loaded = load("run.toml", "other.toml", " sampler.steps = 5 ", "shape=[2, 2]", "seed=0x10", "dtype=float64")
    sampler = fastdiff.DDIMSampler(fastdiff.NoiseSchedule.cosine(100), 5, eta=0.5)
    assert same_samplers(loaded.job.sampler, sampler)
    assert (loaded.job.shape, loaded.job.seed, loaded.job.dtype) == ((2, 2), 16, torch.float64)
    assert loaded.job.name == "nets:network(scale=2.0)"
    assert load("seed=1", "run.toml", "seed=2").job.seed == 2
    assert load("run.toml", "other.toml", "network=nets:function").job.name == "nets:function"
    assert load("run.toml", "network.arguments.path=a=b.pt").factory.arguments == {"path": "a=b.pt"}


def test_a_folder_may_look_like_something_else(folder):
    for text in ("2024-01-01", "12", "a b", "[x", "1 # 2", 'x"'):
        assert load("run.toml", f"out={text}").out == Path(text)
    assert load("run.toml", 'out="1"').out == Path("1")
    with pytest.raises(TypeError, match="^out: expected a string, got {'a': 1}"):
        load("run.toml", "out={a=1}")
    for text in ("true", "[]", '[1, "a"]'):
        with pytest.raises(TypeError, match="^out: expected a string, got "):
            load("run.toml", f"out={text}")
    with pytest.raises(TypeError, match="^out: expected a string, got ''"):
        load("run.toml", "out=")


def test_a_condition_of_another_kind_replaces_the_one_before(folder):
    written(folder, "[conditions]\ny = { random = 7, seed = 3 }\n")
    assert load("run.toml", "other.toml", "conditions.y.seed=4").job.conditions == {"y": random_classes(7, 4)}
    assert load("run.toml", "other.toml", "conditions.y.random=8").job.conditions == {"y": random_classes(8)}
    for text in ("conditions.y.cycle=10", "conditions.y={cycle=10}"):
        assert load("run.toml", "other.toml", text).job.conditions == {"y": cycle(10)}
    assert load("run.toml", "other.toml", "conditions.y=3").job.conditions == {"y": value(3)}


def test_a_sampler_of_ones_own(folder):
    expected = fastdiff.DDPMSampler(fastdiff.NoiseSchedule.linear(50), 4)
    assert same_samplers(load("run.toml", "sampler=nets:sampler").job.sampler, expected)
    written(folder, 'samples = 3\nshape = [2]\nnetwork = "nets:network"\nsampler = "nets:sampler"\n')
    assert same_samplers(load("other.toml").job.sampler, expected)
    with pytest.raises(ValueError, match="^schedule: expected none beside sampler = 'nets:sampler', .* got a table"):
        load("other.toml", "schedule.type=linear")
    with pytest.raises(ValueError, match="^schedule: expected a table with the type of the noise schedule, .* nothing"):
        load("other.toml", "sampler.type=ddim")
    job = load("other.toml", "sampler.type=ddim", "schedule={type='cosine', num_timesteps=100}", "sampler.steps=4").job
    assert same_samplers(job.sampler, load("run.toml").job.sampler)


WRONG = [
    ("sampels=3", ValueError, "sampels: expected one of batch, .*, got 'sampels' .did you mean 'samples'."),
    ("guidance.scales=3", ValueError, "guidance.scales: expected one of scale, uncond, got 'scales' .did you mean"),
    ("samples=4.0", TypeError, "samples: expected an int, got float 4.0"),
    ("samples=true", TypeError, "samples: expected an int, got True"),
    ("samples=0", ValueError, "samples: expected an int >= 1, got 0"),
    ("samples=many", TypeError, "samples: expected an int, got str 'many'"),
    ("shape=3", TypeError, "shape: expected a sequence of ints, got 3"),
    ("shape=[3, 0]", ValueError, "shape: expected an int >= 1, got 0"),
    ("seed=x", TypeError, "seed"),
    ("seed=18446744073709551616", ValueError, "seed"),
    ("batch=0", ValueError, "batch: expected an int >= 1, got 0"),
    ("chunk=12", ValueError, "chunk: expected a multiple of batch=8, got 12"),
    ("dtype=float8", ValueError, "dtype: expected one of float32, .*, got 'float8' .did you mean"),
    ("dtype=8", TypeError, "dtype: expected one of .*, got 8"),
    ("store=png", ValueError, "store: expected one of .*, got 'png'"),
    ("threads=0", ValueError, "threads: expected an int >= 1, got 0"),
    ("device=3", TypeError, "device: expected a string, got 3"),
    ("inexact=1", TypeError, "inexact: expected true or false, got 1"),
    ("network=3", TypeError, "network: expected module:function or a table, got 3"),
    ("network.factory=3", TypeError, "network.factory: expected module:function, got 3"),
    ("network.argument=3", ValueError, "network.argument: expected one of arguments, factory, got 'argument'"),
    ("network.arguments=3", TypeError, "network.arguments: expected a table, got 3"),
    ("schedule=cosine", TypeError, "schedule: expected a table, got 'cosine'"),
    ("schedule.type=cosin", ValueError, "schedule.type: expected one of .*, got 'cosin' .did you mean 'cosine'."),
    ("schedule.type=respace", ValueError, "schedule.type: expected one of .*, got 'respace'"),
    ("schedule.type=3", TypeError, "schedule.type: expected one of .*, got 3"),
    ("schedule.beta_start=0.1", ValueError, "schedule.beta_start: expected an argument of cosine .*, got 'beta_start'"),
    ("schedule.s=-1", ValueError, "schedule.s: expected a value >= 0, got -1"),
    ("schedule.num_timesteps=0", ValueError, "schedule.num_timesteps: expected an int >= 1, got 0"),
    ("schedule.rescale_zero_snr=1", TypeError, "schedule.rescale_zero_snr: expected true or false, got 1"),
    ("schedule.type=warmup", ValueError, "schedule.fraction: expected a value, as warmup takes one, got nothing"),
    ("sampler=3", TypeError, "sampler: expected a table or module:function, got 3"),
    ("sampler.type=dim", ValueError, "sampler.type: expected one of ddim, ddpm, got 'dim' .did you mean 'ddim'."),
    ("sampler.type=none", ValueError, "sampler.type: expected one of ddim, ddpm, got 'none'"),
    (
        "sampler.step=3",
        ValueError,
        "sampler.step: expected an argument of DDIMSampler .*, got 'step' .did you mean 'st",
    ),
    ("sampler.schedule=3", ValueError, "sampler.schedule: expected an argument of DDIMSampler .*, got 'schedule'"),
    ("sampler.table=3", ValueError, "sampler.table: expected an argument of DDIMSampler .*, got 'table'"),
    ("sampler._=3", ValueError, "sampler._: expected an argument of DDIMSampler .*, got '_'"),
    (
        "sampler.variance=learned",
        ValueError,
        "sampler.variance: expected an argument of DDIMSampler .*, got 'variance'",
    ),
    ("sampler.steps=0", ValueError, r"sampler.steps: expected an int in \[1, 100\], got 0"),
    ("schedule.num_timesteps=99999999999", ValueError, r"schedule.num_timesteps: expected an int in \[1, 16777216\]"),
    ("", ValueError, "sources: expected TOML files and key=value, got ''"),
    ('conditions.y={file=""}', TypeError, "conditions.y.file: expected the name of a file, got ''"),
    ("batch=99999999999999999999", ValueError, "batch: expected an int in "),
    ("sampler.eta=x", TypeError, "sampler.eta: expected a number, got 'x'"),
    ("sampler.prediction=noise", ValueError, "sampler.prediction: expected .*, got 'noise'"),
    ("sampler.backend=gpu", ValueError, "sampler.backend: expected one of .*, got 'gpu'"),
    ("sampler=nets:network", TypeError, "sampler: expected nets:network to return a sampler of fastdiff, got Net"),
    ("sampler=nets:raises", ValueError, "sampler: the factory nets:raises raised"),
    ("sampler=nets:number", ValueError, "sampler: nets:number: expected a function without arguments, got int"),
    ("sampler=nets", ValueError, "sampler: expected module:factory, got 'nets'"),
    ("conditions=3", TypeError, "conditions: expected a table, got 3"),
    ("conditions.y=a", TypeError, "conditions.y: expected a number, or a table with one of cycle, .*, got 'a'"),
    ("conditions.y=true", TypeError, "conditions.y: expected a number, or a table .*, got True"),
    ("conditions.y=[1, 2]", TypeError, "conditions.y: expected a number, or a table .*, got .1, 2."),
    ("conditions.y={}", ValueError, "conditions.y: expected one of cycle, random, value, file, got nothing"),
    ("conditions.y.cycel=3", ValueError, "conditions.y.cycel: expected one of .*, got 'cycel' .did you mean 'cycle'."),
    ("conditions.y={cycle=3, value=3}", ValueError, "conditions.y: expected one of cycle, .*, got cycle and value"),
    ("conditions.y={cycle=3, seed=3}", ValueError, "conditions.y.seed: expected one of cycle, got 'seed'"),
    ("conditions.y.cycle=0", ValueError, "conditions.y.cycle: expected an int >= 1, got 0"),
    ("conditions.y.random=1.5", TypeError, "conditions.y.random: expected an int, got float 1.5"),
    ("conditions.y={random=5, seed='a'}", TypeError, "conditions.y.seed: expected an int, got str 'a'"),
    ("conditions.y={value='a'}", TypeError, "conditions.y.value: expected a number or an array of them, got 'a'"),
    ("conditions.y=nan", ValueError, "conditions.y.value: expected finite numbers, got nan"),
    ("conditions.y.file=3", TypeError, "conditions.y.file: expected the name of a file, got 3"),
    ("guidance=2", TypeError, "guidance: expected a table, got 2"),
    ("guidance.scale=2", ValueError, "guidance.uncond: expected a table of conditions, got nothing"),
    ("guidance.uncond.y=2", ValueError, "guidance.scale: expected a number, got nothing"),
    ("guidance={scale='a', uncond={}}", TypeError, "guidance.scale: expected a number, got 'a'"),
    ("guidance={scale=2, uncond={y='a'}}", TypeError, "guidance.uncond.y: expected a number, or a table .*, got 'a'"),
    ("nothere.toml", ValueError, "sources: expected a TOML file or key=value, got 'nothere.toml', which is no file"),
    (".", ValueError, r"\.: expected a file that can be read, got: "),
]


@pytest.mark.parametrize("source, error, message", WRONG)
def test_wrong_settings(folder, source, error, message):
    with pytest.raises(error, match=f"^{message}"):
        load("run.toml", source)


@pytest.mark.parametrize(
    "key, message",
    [
        ("samples", "samples: expected how many, got nothing"),
        ("shape", "shape: expected that of one sample, .*, got nothing"),
        ("network", "network: expected module:function, got nothing"),
        ("type = ", "schedule.type: expected one of .*linear, .*, got nothing"),
        ("num_timesteps", "schedule.num_timesteps: expected a value, as cosine takes one, got nothing"),
    ],
)
def test_missing_keys(folder, key, message):
    lines = (folder / "run.toml").read_text().splitlines()
    missing = next(line for line in lines if line.startswith(key))
    lines.remove(missing)
    with pytest.raises(ValueError, match=f"^{message}$"):
        load(written(folder, "\n".join(lines)))


def test_missing_tables(folder):
    given = ("samples=3", "shape=[2]", "network=nets:network")
    with pytest.raises(ValueError, match="^sampler: expected a table with a type, or module:function, got nothing"):
        load(*given)
    with pytest.raises(ValueError, match="^sampler.type: expected one of ddim, ddpm, got nothing"):
        load(*given, "sampler.steps=3")
    with pytest.raises(ValueError, match="^network.factory: expected module:function, got nothing"):
        load(*given[:2], "network.arguments.scale=1")
    with pytest.raises(ValueError, match="^samples: expected how many, got nothing"):
        load()
    with pytest.raises(TypeError, match="^sources: expected TOML files and key=value, got int"):
        load(3)


def test_files_that_are_no_toml(folder):
    written(folder, "samples = 3\nshape = [1,, 2]\n")
    with pytest.raises(ValueError, match=r"^other.toml: expected TOML, got: .* \(at line 2, column 12\)"):
        load("other.toml")
    (folder / "bytes.toml").write_bytes(b"samples = 3 # \xff\n")
    with pytest.raises(ValueError, match="^bytes.toml: expected TOML in UTF-8, got other bytes"):
        load("bytes.toml")


def test_tomli_where_there_is_no_tomllib(folder, monkeypatch):
    toml = settings._toml()
    used = []

    def loads(text):
        used.append(text)
        return toml.loads(text)

    stand_in = types.SimpleNamespace(loads=loads, TOMLDecodeError=toml.TOMLDecodeError)
    monkeypatch.setitem(sys.modules, "tomllib", None)
    monkeypatch.setitem(sys.modules, "tomli", stand_in)
    assert load("run.toml", "seed=5").job.seed == 5 and used == [RUN, "value = 5"]


# Conditions in files


def test_files_of_conditions(folder):
    classes = np.arange(60) % 7
    np.save(folder / "classes.npy", classes)
    np.savez(folder / "all.npz", classes=classes, big=classes.astype(">f4"))
    for given in ('{file="classes.npy"}', '{file="all.npz", key="classes"}', '{file="all.npz", key="big"}'):
        condition = load("run.toml", f"conditions.y={given}").job.conditions["y"]
        assert len(condition) == 40 and np.array_equal(condition, classes[:40]) and condition.dtype.isnative
    assert isinstance(load("run.toml", "conditions.y.file=classes.npy").job.conditions["y"], np.memmap)
    assert load("run.toml", f"conditions.y.file={folder}/classes.npy").job.conditions["y"].shape == (40,)


def test_files_stand_beside_the_settings_or_in_the_working_directory(folder):
    written(folder, "[conditions]\ny = { file = 'classes.npy' }\n", "deep/more.toml")
    np.save(folder / "classes.npy", np.full(40, 1))
    assert load("run.toml", "deep/more.toml").job.conditions["y"][0] == 1
    np.save(folder / "deep" / "classes.npy", np.full(40, 2))
    assert load("run.toml", "deep/more.toml").job.conditions["y"][0] == 2
    assert load("run.toml", "deep/more.toml", "conditions.y.file=classes.npy").job.conditions["y"][0] == 1
    looked = f"{folder}/deep/no.npy or {folder}/no.npy"
    written(folder, "[conditions]\ny = { file = 'no.npy' }\n", "deep/more.toml")
    with pytest.raises(
        ValueError, match=f"^conditions.y.file: expected a file, got 'no.npy', and there is no file {looked}$"
    ):
        load("run.toml", "deep/more.toml")
    with pytest.raises(ValueError, match=f"and there is no file {folder}/no.npy$"):
        load("run.toml", "conditions.y.file=no.npy")


def test_files_that_are_no_conditions(folder):
    np.save(folder / "few.npy", np.arange(39))
    np.save(folder / "number.npy", np.array(3))
    np.save(folder / "words.npy", np.array(["a"] * 40))
    np.save(folder / "objects.npy", np.array([{}] * 40), allow_pickle=True)
    np.savez(folder / "all.npz", labels=np.arange(40), objects=np.array([{}] * 40))
    whole = (folder / "few.npy").read_bytes()
    (folder / "half.npy").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.npy").write_bytes(b"")
    (folder / "text.npy").write_text("1 2 3")
    packed = bytearray((folder / "all.npz").read_bytes())
    packed[200] ^= 0xFF
    (folder / "damaged.npz").write_bytes(packed)
    unreadable = "conditions.y.file: expected arrays of numbers, .npy or .npz, got "
    for given, error, message in (
        ('"few.npy"', ValueError, "conditions.y.file: expected 40 rows, one per sample, got 39 rows in .*few.npy"),
        ('"number.npy"', ValueError, "conditions.y.file: expected 40 rows, one per sample, got a number in"),
        ('"words.npy"', TypeError, "conditions.y.file: expected numbers, got <U1 in .*words.npy"),
        ('"objects.npy"', ValueError, f"{unreadable}.*objects.npy: "),
        ('"run.toml"', ValueError, f"{unreadable}.*run.toml$"),
        ('"half.npy"', ValueError, f"{unreadable}.*half.npy: "),
        ('"empty.npy"', ValueError, f"{unreadable}.*empty.npy: "),
        ('"text.npy"', ValueError, f"{unreadable}.*text.npy"),
        ('"damaged.npz", key="labels"', ValueError, f"{unreadable}.*damaged.npz: "),
        ('"all.npz", key="objects"', ValueError, f"{unreadable}.*all.npz$"),
        ('"all.npz"', ValueError, "conditions.y.key: expected one of labels, objects, got nothing"),
        ('"all.npz", key="label"', ValueError, "conditions.y.key: .*, got 'label' .did you mean 'labels'."),
        ('"all.npz", key=1', TypeError, "conditions.y.key: expected one of labels, objects, got 1"),
        ('"few.npy", key="labels"', ValueError, "conditions.y.key: expected none, as .*few.npy holds one array"),
    ):
        with pytest.raises(error, match=f"^{message}"):
            load("run.toml", f"conditions.y={{file={given}}}")


# Factories


def test_the_network_is_made_when_it_is_asked_for(folder):
    loaded = load("run.toml", "network.arguments.scale=3")
    assert "nets" not in sys.modules
    network, decode = loaded.make("cpu")
    assert sys.modules["nets"].calls == [3] and decode is None
    assert not network.training and network(torch.ones(1), 0).item() == 3


def test_a_network_is_moved_to_the_device(folder):
    network, decode = load("run.toml", "network=nets:pair").make("meta")
    assert network.scale.device.type == decode.scale.device.type == "meta"
    network, _ = load("run.toml", "network=nets:training", "device=cpu").make()
    assert network.training and network.scale.device.type == "cpu"


def test_a_factory_is_told_the_device(folder):
    load("run.toml", "network=nets:on").make("meta")
    load("run.toml", "network=nets:on", "network.arguments={device='cpu', scale=2.0}").make("meta")
    load("run.toml", "network=nets:function").make("cpu")
    assert sys.modules["nets"].calls == [(torch.device("meta"), 1.0), ("cpu", 2.0)]


@pytest.mark.parametrize(
    "source, error, message",
    [
        ("network=nowhere:make", ValueError, "network.factory: no module 'nowhere' in "),
        ("network=broken:make", ValueError, "network.factory: module 'broken' could not be imported"),
        ("network=nets:nowhere", ValueError, "network.factory: module 'nets' has no 'nowhere'"),
        ("network=nets:number", ValueError, "network.factory: nets:number: expected a function, got int"),
        ("network=nets", ValueError, "network.factory: expected module:factory, got 'nets'"),
        ("network=nets.py:network", ValueError, "network.factory: expected a module's name, such as nets:network"),
        ("network=nets:raises", ValueError, "network.factory: the factory nets:raises raised"),
        (
            "network=nets:three",
            TypeError,
            r"network.factory: expected nets:three to return .* tuple of \(int, int, int",
        ),
        ("network=nets:nothing", TypeError, "network.factory: expected nets:nothing to return .*, got NoneType"),
        (
            "network.arguments.scal=1",
            ValueError,
            r"network.arguments.scal: expected an argument of nets:network \(scale\), got 'scal' .did you mean 'scale'",
        ),
        (
            "network=nets:required",
            ValueError,
            "network.arguments.checkpoint: expected a value, as nets:required takes one, got nothing",
        ),
        (
            "network={factory='nets:pair', arguments={a=1}}",
            ValueError,
            r"network.arguments.a: expected an argument of nets:pair \(none\), got 'a'",
        ),
    ],
)
def test_factories_that_make_no_network(folder, source, error, message):
    loaded = load("run.toml", source)
    with pytest.raises(error, match=f"^{message}") as caught:
        loaded.make("cpu")
    causes = {"network=nets:raises": ArithmeticError, "network=broken:make": ModuleNotFoundError}
    assert isinstance(caught.value.__cause__, causes.get(source, type(None)))


def test_arguments_are_hidden_in_commands_alone(folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mine", "--option"])
    factories.find("nets:network")
    assert sys.modules["nets"].argv == ["mine", "--option"]
    del sys.modules["nets"]
    with factories.without_arguments():
        factories.find("nets:network")
    assert sys.modules["nets"].argv == [str(folder / "nets.py")] and sys.argv == ["mine", "--option"]


# Conditions


INDICES = torch.tensor([0, 1, 2, 9, 10, 2**32 + 5, 2**63 - 1])


def test_cycle():
    assert cycle(10)(INDICES).tolist() == [int(i) % 10 for i in INDICES]
    assert repr(cycle(10)) == "cycle(n=10)" and cycle(10) == cycle(np.int64(10)) != cycle(9)


@pytest.mark.parametrize("n, seed", [(10, 0), (1000, 7), (2**32, -1), (1, 2**64 - 1), (3, -(2**63))])
def test_random_classes_are_those_of_the_scalar_mixer(n, seed):
    first = mix64(seed)
    expected = [((mix64((first + int(i)) % 2**64) >> 32) * n) >> 32 for i in INDICES]
    drawn = random_classes(n, seed)(INDICES)
    assert drawn.dtype == torch.int64 and drawn.tolist() == expected


def test_random_classes_are_even_and_independent():
    indices = torch.arange(100_000)
    first, other = random_classes(10)(indices), random_classes(10, seed=1)(indices)
    counts = torch.bincount(first * 10 + other, minlength=100)
    # chi-squared with 99 degrees of freedom: above 149 in one of 1000 cases, and these seeds are fixed
    assert ((counts - 1000) ** 2 / 1000).sum() < 149
    assert repr(random_classes(10, 1)) == "random_classes(n=10, seed=1)"
    assert random_classes(10) == random_classes(10, seed=0) != random_classes(10, 1)


@pytest.mark.parametrize(
    "given, dtype, shape, text",
    [
        (3, torch.int64, [], "value(3, int64)"),
        (2.5, torch.float32, [], "value(2.5, float32)"),
        ([1, 2], torch.int64, [2], "value([1, 2], int64)"),
        ([1, 0.5], torch.float32, [2], "value([1.0, 0.5], float32)"),
        (np.zeros((1, 2), ">f8"), torch.float64, [1, 2], "value([[0.0, 0.0]], float64)"),
        (torch.ones(2, dtype=torch.float16), torch.float16, [2], "value([1.0, 1.0], float16)"),
    ],
)
def test_value(given, dtype, shape, text):
    made = value(given)
    result = made(INDICES)
    assert result.dtype == dtype and list(result.shape) == [7, *shape] and repr(made) == text
    assert (result == torch.as_tensor(np.array(made.v))).all()
    assert made == value(given) and hash(made) == hash(value(given)) and made != value(7.0) and made != 3
    result[0] = 9
    assert (made(INDICES[:1]) != 9).all()


def test_large_values_are_told_by_a_hash():
    made = value(np.arange(40.0))
    assert repr(made).startswith("value(shape [40], sha256 ") and "\n" not in repr(made)
    assert repr(made) != repr(value(np.arange(40.0) + 1)) and made != value(np.arange(40.0) + 1)


@pytest.mark.parametrize(
    "made, error, message",
    [
        (lambda: cycle(0), ValueError, "n: expected an int >= 1, got 0"),
        (lambda: cycle(True), TypeError, "n: expected an int, got True"),
        (lambda: random_classes(2**32 + 1), ValueError, r"n: expected an int in \[1, 4294967296\]"),
        (lambda: random_classes(5, 2**64), ValueError, "seed: expected an int in"),
        (lambda: value("a"), TypeError, "v: expected a number or an array of them, got 'a'"),
        (lambda: value(None), TypeError, "v: expected a number or an array of them, got None"),
        (lambda: value(2**63), ValueError, r"v: expected an int in \[-2\*\*63, 2\*\*63\), got 92233"),
        (lambda: value([2**63, 1.5, "a"]), TypeError, "v: expected a number or an array of them, got "),
        (lambda: value([[1], [1, 2]]), TypeError, "v: expected a number or an array of them, got "),
        (lambda: value([True]), TypeError, "v: expected a number or an array of them, got "),
        (lambda: value(1e300), ValueError, r"v: expected finite numbers, got 1e\+300"),
        (lambda: cycle(3)([1, 2]), TypeError, "indices: expected an int64 tensor, got list"),
        (lambda: value(3)(torch.ones(2)), ValueError, r"indices: expected int64 \[B\], got torch.float32 \[2\]"),
        (lambda: random_classes(3)(INDICES[None]), ValueError, r"indices: expected int64 \[B\], got .* \[1, 7\]"),
    ],
)
def test_wrong_conditions(made, error, message):
    with pytest.raises(error, match=f"^{message}"):
        made()


# Engine


@pytest.mark.parametrize(
    "environ, expected",
    [
        ({}, (0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (3, 8, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8, 3)),
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "2"}, (5, 6, 2)),
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6"}, (5, 6, 5)),
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, (0, 1, 0)),
        # torchrun in a job of SLURM
        ({"RANK": "1", "WORLD_SIZE": "4", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, (1, 4, 1)),
    ],
)
def test_ranks(environ, expected, monkeypatch):
    assert engine.rank_of(environ) == expected
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, text in environ.items():
        monkeypatch.setenv(name, text)
    assert engine.rank_of() == expected


@pytest.mark.parametrize(
    "environ, message",
    [
        ({"RANK": "3"}, "WORLD_SIZE: expected it to be set, as RANK is, got nothing"),
        ({"WORLD_SIZE": "3"}, "RANK: expected it to be set, as WORLD_SIZE is, got nothing"),
        ({"LOCAL_RANK": "3"}, "RANK: expected it to be set, as LOCAL_RANK is, got nothing"),
        ({"SLURM_STEP_NUM_TASKS": "3"}, "SLURM_PROCID: expected it to be set, as SLURM_STEP_NUM_TASKS is, got nothing"),
        ({"RANK": "8", "WORLD_SIZE": "8"}, r"RANK: expected an int in \[0, 8\), got '8'"),
        ({"RANK": "-1", "WORLD_SIZE": "8"}, r"RANK: expected an int in \[0, 8\), got '-1'"),
        ({"RANK": "x", "WORLD_SIZE": "8"}, r"RANK: expected an int in \[0, 8\), got 'x'"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE: expected an int of at least 1, got '0'"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE: expected an int of at least 1, got ''"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "a"}, "LOCAL_RANK: expected an int of at least 0, got 'a'"),
        ({"SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "8"}, r"SLURM_PROCID: expected an int in \[0, 8\), got '9'"),
    ],
)
def test_wrong_ranks(environ, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        engine.rank_of(environ)


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert engine.device_of(3) == torch.device("cpu") == engine.device_of(3, "cpu")
    with pytest.raises(ValueError, match="^device: expected one that is here, got 'cuda:1', and torch finds no CUDA"):
        engine.device_of(0, "cuda:1")
    for name in ("meta", "mps"):
        with pytest.raises(ValueError, match=f"^device: expected one that is here and holds numbers, got '{name}'"):
            engine.device_of(0, name)
    with pytest.raises(ValueError, match="^device: expected the name of a device, .* got 'gpu'"):
        engine.device_of(0, "gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [engine.device_of(rank) for rank in range(3)] == [torch.device("cuda", index) for index in (0, 1, 0)]
    assert engine.device_of(3, "cuda") == torch.device("cuda", 1)
    assert engine.device_of(3, "cuda:0") == torch.device("cuda", 0) and engine.device_of(3, "cpu").type == "cpu"


# The command


@pytest.fixture
def command(folder, monkeypatch, capsys):
    """Runs the command in this process; returns its status, and what it printed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def call(*words):
        try:
            status = __main__.main([str(word) for word in words])
        except SystemExit as end:
            status = end.code
        return status, capsys.readouterr()

    return call


def test_a_run(command, folder):
    status, printed = command("sample", "run.toml", "--out", "there", "seed=1", "batch=4", "--quiet")
    assert (status, printed.out, printed.err) == (0, "", "")
    assert Folder("there").manifest()["seed"] == 1 and (folder / "there" / "SHA256SUMS").is_file()
    status, printed = command("status", "there")
    assert status == 0 and "40 of 40 samples" in printed.out
    given = ("run.toml", "seed=1", "batch=4", "--out", "there")
    status, printed = command("verify", *given, "--index", "0", "39", "7")
    assert (status, printed.out) == (0, "3 of 3 samples equal bit for bit\n"), printed.err
    status, printed = command("verify", *given, "--random", "100")
    assert (status, printed.out) == (0, "40 of 40 samples equal bit for bit\n")
    status, printed = command("verify", *given, "network.arguments.scale=0.6", "--index", "3", "4")
    assert status == 1 and "sample 3: other bits, largest difference 0." in printed.out
    assert printed.out.endswith("0 of 2 samples equal bit for bit\n")


def test_a_run_of_two_processes_one_after_the_other(command, monkeypatch):
    """A share by the command's own numbers, the rest by those of the environment."""
    assert command("sample", "run.toml", "out=one", "--quiet")[0] == 0
    assert command("sample", "run.toml", "out=two", "--rank", 1, "--world-size", 2, "--quiet")[0] == 0
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command("sample", "run.toml", "out=two", "--quiet")[0] == 0
    assert Path("one/SHA256SUMS").read_text() == Path("two/SHA256SUMS").read_text()


def test_shares_and_devices_reach_the_worker(command, monkeypatch):
    seen = []
    monkeypatch.setattr(__main__, "sample", lambda **options: seen.append(options))
    assert command("sample", "run.toml", "out=a", "--rank", 2, "--world-size", 5, "--inexact")[0] == 0
    assert command("sample", "run.toml", "out=a", "inexact=true", "--device", "cpu", "--out", "b")[0] == 0
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert command("sample", "run.toml", "out=a", "--quiet")[0] == 0
    keys = ("rank", "world_size", "inexact", "progress", "out", "device")
    cpu = torch.device("cpu")
    assert [tuple(options[key] for key in keys) for options in seen] == [
        (2, 5, True, True, Path("a"), cpu),
        (0, 1, True, True, Path("b"), cpu),
        (3, 4, False, False, Path("a"), cpu),
    ]


def test_an_unfinished_run_is_told_by_the_status(command):
    loaded = load("run.toml")
    fastdiff.bulk.sample(loaded.job, loaded.make("cpu")[0], "part", chunks=[1], progress=False)
    status, printed = command("status", "part")
    assert status == 1 and "8 of 40 samples" in printed.out


def test_merge_gets_what_was_given(command, monkeypatch):
    seen = []
    monkeypatch.setattr(__main__, "merge", lambda *values, **options: seen.append((values, options)))
    assert command("merge", "there", "--npz", "all.npz")[0] == 0
    assert command("merge", "there", "--png", "images", "--names", "{label}/{index}.png", "--labels", "y")[0] == 0
    assert command("merge", "there", "--npy", "all.npy")[0] == 0
    assert seen == [
        (("there",), {"npz": "all.npz"}),
        (("there",), {"png": "images", "names": "{label}/{index}.png", "labels": "y"}),
        (("there",), {"npy": "all.npy"}),
    ]


@pytest.mark.parametrize(
    "words, message",
    [
        (("sample", "run.toml"), "out: expected a folder, by --out or in the settings, got nothing"),
        (("sample", "run.toml", "--out", ""), "out: expected a folder, by --out or in the settings, got nothing"),
        (("sample", "run.toml", "out=a", "sampler.step=3"), "sampler.step: expected an argument of DDIMSampler"),
        (("sample", "run.toml", "out=a", "--rank", "1"), "--world-size: expected --rank and --world-size, both or nei"),
        (("sample", "run.toml", "out=a", "--rank", "2", "--world-size", "2"), "rank: expected an int in [0, 1], got 2"),
        (("sample", "run.toml", "out=a", "--device", "cuda"), "device: expected one that is here, got 'cuda', and"),
        (("sample", "run.toml", "out=a", "network=nets:training"), "network: expected it in evaluation mode, got trai"),
        (("sample", "run.toml", "out=a", "network=nowhere:make"), "network.factory: no module 'nowhere' in "),
        (("verify", "run.toml", "out=a", "--index", "0"), "out: expected the folder of a run, with a manifest.json"),
        (("status", "a"), "out: expected the folder of a run, with a manifest.json, got a"),
    ],
)
def test_errors_of_the_user(command, folder, words, message):
    status, printed = command(*words)
    assert status == 2 and printed.err.startswith(f"fastdiff.bulk: {message}"), printed.err
    assert printed.err.count("\n") == 1 and not printed.out and not (folder / "a").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        ((), "the following arguments are required: command"),
        (("sample",), "the following arguments are required: SETTINGS"),
        (("sample", "run.toml", "--rank", "x"), "argument --rank: invalid int value: 'x'"),
        (("sample", "run.toml", "--fast"), "unrecognized arguments: --fast"),
        (("verify", "run.toml"), "one of the arguments --index --random is required"),
        (("verify", "run.toml", "--random", "0"), "argument --random: expected an integer of at least 1, got '0'"),
        (("verify", "run.toml", "--random", "1", "--index", "1"), "not allowed with argument"),
        (("merge", "there"), "one of the arguments --npz --png --npy is required"),
        (("merge", "there", "--npz", "a", "--png", "b"), "argument --png: not allowed with argument --npz"),
        (("status", "there", "more"), "unrecognized arguments: more"),
    ],
)
def test_usage(command, words, message):
    status, printed = command(*words)
    assert status == 2 and message in printed.err and not printed.out


def test_what_the_users_code_raises_is_shown(command):
    status, printed = command("sample", "run.toml", "out=a", "network=nets:network_raises")
    assert status == 1 and "Traceback" in printed.err and "nets.py" in printed.err
    assert printed.err.endswith("fastdiff.bulk: the run failed: ValueError: in the network\n")
    status, printed = command("sample", "run.toml", "out=a", "network=nets:raises")
    assert status == 2 and "ArithmeticError: in the factory" in printed.err
    assert printed.err.endswith("fastdiff.bulk: network.factory: the factory nets:raises raised\n")


def test_a_run_that_fails(command):
    status, printed = command("sample", "run.toml", "out=a", "network=nets:nan")
    assert status == 1 and printed.err.startswith("fastdiff.bulk: network: expected finite outputs, got NaN")
    assert printed.err.count("\n") == 1


def test_interruption(command):
    status, printed = command("sample", "run.toml", "out=a", "network=nets:interrupted")
    assert status == 130
    assert printed.err == (
        "fastdiff.bulk: interrupted; what was finished stays, and the same command goes on from there\n"
    )


def environment():
    return os.environ | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}


def test_as_a_process(folder):
    """The module comes from the working directory, and sees no arguments."""
    (folder / "mine.py").write_text("import sys\nassert sys.argv == [__file__], sys.argv\n" + NETS)
    words = [sys.executable, "-m", "fastdiff.bulk", "sample", "run.toml", "network=mine:network", "--out=there"]
    run = subprocess.run(words, env=environment(), capture_output=True, text=True)
    assert run.returncode == 0 and "40 of 40 samples" in run.stderr, run.stderr
    run = subprocess.run([*words, "seed=4"], env=environment(), capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("fastdiff.bulk: seed: expected 0, as in there/manifest.json")


def test_what_importing_costs():
    """fastdiff does not import its bulk part, nor that what only some runs need."""
    code = """
import sys, fastdiff
assert not any(name.startswith("fastdiff.bulk") for name in sys.modules)
before = set(sys.modules)
import fastdiff.bulk, fastdiff.bulk.settings
late = {"tomllib", "tomli", "PIL"} & (set(sys.modules) - before)
assert not late, late
"""
    run = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_first_command_names_it(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fastdiff", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_module("fastdiff", run_name="__main__")
    assert "python -m fastdiff.bulk --help" in capsys.readouterr().out
