"""Storage through a proxy that answers as busy and broken object stores do: results stay right, or errors are named."""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from s3fs import S3FileSystem

from lvlmrec import storage
from lvlmrec.errors import InputError, JobFailed
from tests.faults import Faults, Proxy, faulty

pytestmark = pytest.mark.thorough  # real retries really wait

Broken = Callable[[Faults], AbstractContextManager[Proxy]]


@pytest.fixture
def broken(bucket: str, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Broken]:
    """`broken(faults)`: within the block storage reaches the bucket through a proxy with these faults."""

    @contextmanager
    def through(faults: Faults) -> Iterator[Proxy]:
        with faulty(s3_server, faults) as proxy, monkeypatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
            S3FileSystem.clear_instance_cache()
            yield proxy
        S3FileSystem.clear_instance_cache()

    yield through
    S3FileSystem.clear_instance_cache()


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Records the seconds that are waited between tries. Those of botocore's standard mode are a tenth as long."""
    from botocore.retries import standard

    seconds: list[float] = []
    wait, sleep = standard.ExponentialBackoff.delay_amount, asyncio.sleep

    async def noted(delay: float, result: object = None) -> object:
        seconds.append(delay)
        return await sleep(delay, result)

    monkeypatch.setattr(standard.ExponentialBackoff, "delay_amount", lambda self, context: wait(self, context) / 10)
    monkeypatch.setattr(asyncio, "sleep", noted)
    return seconds


def everything(root: str) -> None:
    """Calls every function of storage and checks its result."""
    files = {f"folder/{i:02d}.bin": bytes([i]) * 50_000 for i in range(10)}
    for name, content in files.items():
        storage.write_bytes(storage.join(root, name), content)
    for name, content in files.items():
        assert storage.read_bytes(storage.join(root, name)) == content
    folder = storage.join(root, "folder")
    assert [f.uri for f in storage.list_files(root, recursive=True)] == [storage.join(root, name) for name in files]
    assert [f.size for f in storage.iter_files(folder)] == [50_000] * 10
    assert storage.list_files(root) == []
    assert storage.is_dir(folder) and not storage.is_dir(f"{folder}/00.bin") and not storage.is_dir(f"{root}/none")
    assert storage.exists(folder) and storage.exists(f"{folder}/00.bin") and not storage.exists(f"{root}/none")
    table = pa.table({"a": np.arange(30_000), "b": np.arange(30_000) * 2})
    storage.write_table(f"{root}/t.parquet", table)
    assert storage.read_table(f"{root}/t.parquet") == table
    assert storage.read_table(f"{root}/t.parquet", ["b"]) == table.select(["b"])
    with storage.local_copy(f"{folder}/07.bin") as path:
        assert path.read_bytes() == files["folder/07.bin"]
    leases = [storage.join(root, "leases", str(i)) for i in range(10)]
    assert [storage.create_bytes(uri, b"mine") for uri in leases] == [True] * 10  # though answers were lost
    assert [storage.create_bytes(uri, b"late") for uri in leases] == [False] * 10
    with pytest.raises(FileNotFoundError, match=f"{root}/none: no such file"):
        storage.read_bytes(f"{root}/none")
    storage.remove(folder)
    storage.remove(folder)
    assert not storage.exists(folder)
    assert len(storage.list_files(root, recursive=True)) == 11


@pytest.mark.parametrize("s3_server", ["s3rver"], indirect=True)
def test_every_function_on_another_server(bucket: str) -> None:
    S3FileSystem.clear_instance_cache()
    everything(f"{bucket}/prefix")


@pytest.mark.parametrize("s3_server", ["moto", "s3rver"], indirect=True)
def test_every_function_under_throttling_and_cut_connections(broken: Broken, bucket: str) -> None:
    with broken(Faults(slow_down=0.2, cut=0.05)) as proxy:
        everything(f"{bucket}/prefix")
    assert proxy.counts["slow_down"] > 10 and proxy.counts["cut"] > 2, proxy.counts


def test_every_function_when_access_is_denied_now_and_then(broken: Broken, bucket: str) -> None:
    with broken(Faults(deny=0.1)) as proxy:
        everything(f"{bucket}/prefix")
    assert proxy.counts["deny"] > 2, proxy.counts


@pytest.mark.parametrize(
    ("checksums", "message"), [(True, "Expected checksum .* did not match"), (False, "gave 128000 of 256000 bytes")]
)
def test_bodies_that_look_whole_but_are_not_are_read_again(
    broken: Broken, bucket: str, checksums: bool, message: str
) -> None:
    content = bytes(range(256)) * 1000
    storage.write_bytes(f"{bucket}/file", content)
    storage.write_table(f"{bucket}/t.parquet", table := pa.table({"a": np.arange(50_000)}))
    with broken(Faults(shorten=0.4, checksums=checksums)) as proxy:
        for _ in range(6):
            assert storage.read_bytes(f"{bucket}/file") == content
            assert storage.read_table(f"{bucket}/t.parquet") == table
            with storage.local_copy(f"{bucket}/file") as path:
                assert path.read_bytes() == content
        assert proxy.counts["shorten"] > 3
        proxy.faults.shorten = 1.0
        with pytest.raises(storage.StorageError, match=f"{bucket}/file: {message}"):
            storage.read_bytes(f"{bucket}/file")
        with pytest.raises(storage.StorageError, match=message), storage.local_copy(f"{bucket}/file"):
            pass
        with pytest.raises(storage.StorageError, match=r"t\.parquet"):
            storage.read_table(f"{bucket}/t.parquet")


@pytest.mark.parametrize("use", [storage.exists, storage.is_dir, storage.read_bytes, storage.remove])
def test_a_real_denial_ends_soon_with_one_line(
    broken: Broken, bucket: str, waits: list[float], use: Callable[[str], object]
) -> None:
    with broken(Faults(deny=1.0)) as proxy:
        with pytest.raises(storage.StorageRefused, match=rf"^{bucket}/file: (Access Denied|Forbidden)$") as error:
            use(f"{bucket}/file")
        assert proxy.counts["deny"] == storage.ATTEMPTS
    assert 0 < sum(waits) < 10
    assert isinstance(error.value, InputError) and isinstance(error.value, OSError)


def test_throttling_without_end_is_given_up_with_one_line(broken: Broken, bucket: str, waits: list[float]) -> None:
    with broken(Faults(slow_down=1.0)) as proxy:
        with pytest.raises(storage.StorageError, match=f"^{bucket}/file: .*reduce your request rate") as error:
            storage.write_bytes(f"{bucket}/file", b"")
        assert 10 <= proxy.counts["slow_down"] <= storage.ATTEMPTS**2
    assert 0 < sum(waits) < 30
    assert isinstance(error.value, JobFailed)


def test_a_store_that_falls_silent_is_given_up(broken: Broken, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes(f"{bucket}/file", b"content")
    monkeypatch.setattr(S3FileSystem, "read_timeout", 0.5)  # seconds; 15 as it comes
    with broken(Faults(delay_s=3.0, methods=("GET",))) as proxy:
        with pytest.raises(storage.StorageError, match=f"^{bucket}/file: Read timeout on endpoint URL"):
            storage.read_bytes(f"{bucket}/file")
        assert proxy.counts["GET"] == storage.ATTEMPTS


def test_a_wrong_endpoint_or_no_credentials_end_with_one_line(
    broken: Broken, bucket: str, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        with pytest.raises(storage.StorageRefused, match=f"^{bucket}/file: Could not connect to the endpoint URL"):
            storage.exists(f"{bucket}/file")
    assert 0 < sum(waits) < 10
    S3FileSystem.clear_instance_cache()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", "/nowhere")
    with pytest.raises(storage.StorageRefused, match=f"^{bucket}/file: .*credentials"):
        storage.read_bytes(f"{bucket}/file")


def test_region_endpoint_and_profile_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    for name in ("AWS_DEFAULT_REGION", "AWS_REGION", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "config").write_text(
        "[profile lab]\nregion = eu-north-1\nendpoint_url = http://127.0.0.1:9\n"
        "aws_access_key_id = lab\naws_secret_access_key = lab\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    request.addfinalizer(S3FileSystem.clear_instance_cache)
    S3FileSystem.clear_instance_cache()
    with storage._filesystem("s3://bucket") as (fs, _):
        assert (fs.s3.meta.region_name, fs.s3.meta.endpoint_url) == ("eu-north-1", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_REGION", "us-west-2")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:10")
    S3FileSystem.clear_instance_cache()
    with storage._filesystem("s3://bucket") as (fs, _):
        assert (fs.s3.meta.region_name, fs.s3.meta.endpoint_url) == ("us-west-2", "http://127.0.0.1:10")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    S3FileSystem.clear_instance_cache()
    with pytest.raises(storage.StorageRefused, match=r"^s3://bucket/file: .*profile \(nobody\) could not be found"):
        storage.exists("s3://bucket/file")


def test_a_put_whose_answer_was_lost_is_ours(broken: Broken, bucket: str) -> None:
    with broken(Faults(cut=0.5, methods=("PUT",))) as proxy:
        made = [storage.create_bytes(f"{bucket}/{i}", b"") for i in range(10)]
    assert made == [True] * 10
    assert proxy.counts["cut"] > 2


def test_deletions_that_failed_key_by_key_are_repeated(broken: Broken, bucket: str) -> None:
    storage.write_bytes(f"{bucket}/folder/file", b"")
    with broken(Faults(undeleted=2)) as proxy:
        storage.remove(f"{bucket}/folder")
        assert proxy.counts["POST"] == 3
    assert not storage.exists(f"{bucket}/folder")


@pytest.mark.thorough
def test_a_multipart_upload_is_whole_or_not_there(broken: Broken, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = np.random.default_rng(0).bytes(101 * 2**20)  # above it, s3fs uploads in parts
    with broken(Faults(cut=1.0, methods=("PUT",))), monkeypatch.context() as patch:  # no part's answer arrives
        patch.setattr(S3FileSystem, "retries", 1)
        with pytest.raises(storage.StorageError):
            storage.write_bytes(f"{bucket}/file", content)
    assert storage.list_files(bucket) == []
    with broken(Faults(cut=0.5, seed=1)) as proxy:  # the end's answer is lost too
        storage.write_bytes(f"{bucket}/file", content)
    assert proxy.counts["POST"] > 2
    assert storage.read_bytes(f"{bucket}/file") == content


def test_a_file_replaced_while_it_is_read_is_read_anew(bucket: str) -> None:
    tables = [pa.table({"a": np.full(100_000, i)}) for i in range(2)]
    uri, opens = f"{bucket}/t.parquet", []
    storage.write_table(uri, tables[0])

    def replace_then_read(file: object) -> object:
        opens.append(file)
        if len(opens) == 1:
            storage.write_table(uri, tables[1])
        return pa.parquet.read_table(file)

    assert storage._read(uri, replace_then_read) == tables[1]
    assert len(opens) == 2


def test_threads_and_forks_share_nothing_but_the_store(bucket: str) -> None:
    for i in range(20):
        storage.write_bytes(f"{bucket}/{i}", bytes([i]) * 1000)
    with ThreadPoolExecutor(8) as pool:
        assert [c[0] for c in pool.map(lambda i: storage.read_bytes(f"{bucket}/{i}"), range(20))] == [*range(20)]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert [len(c) for c in pool.map(storage.read_bytes, [f"{bucket}/{i}" for i in range(20)])] == [1000] * 20
