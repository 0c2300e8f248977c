"""The files beside a manifest: in a local folder, at `http(s)://HOST/FOLDER`, or from `pipe:COMMAND` with `{}` for the name."""

import subprocess
import time
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

BACK_OFF = (0, 1, 2, 4)  # seconds before each try
STALL = 60  # seconds without a byte from a server end a try
COMMAND_SECONDS = 600  # the longest a command may take: it may say nothing while it works


def address(folder: str | Path, name: str) -> Path | str:
    """A file's path where it is local, else its URL or `pipe:COMMAND`.  ValueError where the folder is of no known kind."""
    scheme, _, rest = str(folder).partition(":")
    if scheme in ("http", "https") and rest:
        return f"{folder.rstrip('/')}/{name}"
    if scheme == "pipe" and "{}" in rest:
        return folder.replace("{}", name)
    if scheme == "pipe" or rest.startswith("//"):
        raise ValueError(f"shards {folder}: give a folder, http(s)://HOST/FOLDER, or a command that prints file {{}}, such as "
                         "'pipe:aws s3 cp s3://bucket/wiki/{} -'")
    return Path(folder) / name


def fetch(folder: str | Path, name: str, size: int | None = None) -> bytes:
    """All bytes of a file, in four tries where it is not local, `size` of them where that is known.  OSError in one line."""
    where = address(folder, name)
    if isinstance(where, Path):
        return where.read_bytes()
    for seconds in BACK_OFF:
        time.sleep(seconds)
        try:
            if where.startswith("pipe:"):
                data = subprocess.run(where[5:], shell=True, check=True, stdin=subprocess.DEVNULL, capture_output=True,
                                      timeout=COMMAND_SECONDS).stdout
            else:
                with urlopen(where, timeout=STALL) as answer:
                    data = answer.read()  # IncompleteRead where the server promised more
            if size in (None, len(data)):
                return data
            wrong = f"{len(data):,} bytes came, but the manifest says {size:,}"
        except HTTPError as error:
            wrong = f"HTTP status {error.code} {error.reason}"
            if error.code < 500 and error.code != 429:  # not a matter of time
                raise OSError(wrong) from error
        except subprocess.CalledProcessError as error:
            wrong = f"exit code {error.returncode}: {error.stderr.decode(errors='replace').strip().split(chr(10))[-1]}"
        except (OSError, HTTPException, subprocess.TimeoutExpired) as error:
            wrong = str(getattr(error, "reason", error)) or type(error).__name__
    raise OSError(f"{wrong}; {len(BACK_OFF)} tries")
