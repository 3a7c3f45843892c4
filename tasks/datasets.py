"""The published datasets: which files, what they must contain, and how they are fetched.

Files of `datasets/` in the authors' repository at one commit; `python data.py download NAME` is the only
command of this project that opens the network.
"""
import hashlib
import http.client
import lzma
import shutil
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from support.files import BadInput, atomic

COMMIT = "6d7d0d1f296441beff39a95c801db7f683e3b353"
BASE_URL = f"https://raw.githubusercontent.com/galilai-group/llm-jepa/{COMMIT}/datasets"

PUBLISHED = {  # dataset -> split -> (file, its git blob id at that commit)
    "nlrx_synth": {"train": ("synth_train.jsonl", "cbe45f8f9fbb126e09763d5062b01319285ce045"),
                   "test": ("synth_test.jsonl", "e9a539bf83c933ab8d347d49a067aa527f118853")},
    "nlrx_turk": {"train": ("turk_train.jsonl", "8ceb7cba7476cc73259d17239be798a98b4ded93"),
                  "test": ("turk_test.jsonl", "a139f00a37699a9fa4f8e0921f833208932d956b")},
    "gsm8k": {"train": ("gsm8k_train.jsonl", "f9b00a73bd5f61064b76faba80dbd1277139914d"),
              "test": ("gsm8k_test.jsonl", "4fa1a98ff47ef43b041b21410f9f32d913cc8f6e")},
    "spider": {"train": ("spider_train.jsonl", "4d4453e4fd5667a535d131f5e4d55a4bca3f65f2"),
               "test": ("spider_test.jsonl", "7fe5982be65417ab9783573e1f78dc6e9d2e5847")},
    "rotten_tomatoes": {"train": ("rotten_tomatoes_train.jsonl", "3c78fd92d32095d3601760045670b9a1a667604e"),
                        "test": ("rotten_tomatoes_test.jsonl", "205840bbe7a40cb081be1c416cf191ad43da788c")},
    "yelp": {"train": ("yelp_train.jsonl", "80dfafcf24aa9cff0dd98acea5bf24e1b3ffce86"),
             "test": ("yelp_test.jsonl", "350da2d18a7fe2d5320b59be3d5497cd0769d7e3")},
    "nq_open": {"train": ("nq_open_train.jsonl", "de280d6519663bf213a9b31db79beba8ab7135d4"),
                "test": ("nq_open_test.jsonl", "826adcca5934f58f92f0192b6a2e5cc42590877d")},
    "hellaswag": {"train": ("hellaswag_train.jsonl", "127b4e84b5034838573e295150eabb6355bca002"),
                  "test": ("hellaswag_test.jsonl", "013306d4b981bd0a860f8d2a7d7a18624f3cb8a0")},
    "paraphrase": {"train": ("paraphrase_train.jsonl", "b223c762dca836132e29faee27f76c30dafba714")},
}

# Spider's databases lie in Git LFS, so elsewhere; a mirror (--base_url) has them beside the other files
SPIDER_URL = f"https://media.githubusercontent.com/media/galilai-group/llm-jepa/{COMMIT}"
SPIDER_ZIP = ("spider_data.zip", "00636695dabed6b5f4b8328a16b13e069a2f16591d5efcce57660669c85b121b")  # sha256


def git_blob_id(path: Path) -> str:
    """What `git hash-object` prints."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(url: str, path: Path, digest: Callable[[Path], str], wanted: str) -> None:
    """Fetch a file: it is there whole and checked, or not at all.

    A connection that is cut is taken up again where it was cut, if the server can (HTTP ranges), as long as
    every attempt comes further than those before. BadInput if none does, or if the sum is wrong.
    """
    done, furthest, size = 0, -1, None
    with atomic(path) as temporary:
        with open(temporary, "wb") as file, tqdm(unit="B", unit_scale=True, desc=path.name) as bar:
            while size is None or done < size:
                problem = None
                try:
                    headers = {"Range": f"bytes={done}-"} if done else {}
                    with urllib.request.urlopen(urllib.request.Request(url, headers=headers),
                                                timeout=60) as reply:
                        if done and reply.status != 206:  # the whole file again
                            done = file.seek(0)
                            file.truncate()
                        length = int(reply.headers.get("Content-Length") or 0)
                        bar.total = size = done + length if length else None
                        while chunk := reply.read(1 << 16):
                            done += file.write(chunk)
                            bar.update(done - bar.n)
                    if size is None:
                        break
                except (OSError, ValueError, http.client.HTTPException) as error:  # URLError is an OSError
                    problem = str(error) or type(error).__name__
                if (problem or done < size) and done <= furthest:
                    raise BadInput(f"{url}: {problem or f'cut off after {done} of {size} bytes'}; "
                                   "nothing was written, try again")
                furthest = done
        if digest(temporary) != wanted:
            raise BadInput(f"{url}: {done} bytes that are not the published file; nothing was written, "
                           "try again")


def unzip(archive: Path, folder: Path) -> None:
    """Unpack into a new folder, whole or not at all. BadInput if the archive is damaged or has a member that
    would land outside of the folder."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as content:
            for name in content.namelist():
                path = PurePosixPath(name)
                if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
                    raise BadInput(f"{archive}: member {name!r} would leave {folder}; nothing was unpacked")
            content.extractall(temporary)
        temporary.rename(folder)
    except BadInput:
        raise
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError, RuntimeError) as error:
        raise BadInput(f"{archive}: not a zip file that can be read ({error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def download(name: str, data_dir: str | Path, base_url: str = "") -> None:
    """Fetch the files of a dataset into data_dir; base_url: of a mirror."""
    data_dir = Path(data_dir)
    data_dir.mkdir(parents=True, exist_ok=True)
    for file_name, blob_id in PUBLISHED[name].values():
        path = data_dir / file_name
        if path.exists() and git_blob_id(path) == blob_id:
            print(f"{path}: already here")
            continue
        fetch(f"{(base_url or BASE_URL).rstrip('/')}/{file_name}", path, git_blob_id, blob_id)
        print(f"{path}: {path.stat().st_size} bytes, checked")
    if name == "spider":
        (file_name, digest), databases = SPIDER_ZIP, data_dir / "spider_data"
        if databases.exists():
            print(f"{databases}: already here")
            return
        archive = data_dir / file_name
        if not archive.exists() or sha256(archive) != digest:
            fetch(f"{(base_url or SPIDER_URL).rstrip('/')}/{file_name}", archive, sha256, digest)
        unzip(archive, databases)
        archive.unlink()
        print(f"{databases}: unpacked, checked")
