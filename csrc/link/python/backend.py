"""Builds the wheel: the package, the header and the library that csrc/link/build writes. Standard library alone.

KVWARP_TREE names a tree that is there already.
"""
import base64
import hashlib
import os
import re
import subprocess
import sysconfig
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAME = "kvwarp"


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    project = (HERE / "pyproject.toml").read_text()
    version, summary, python = (
        re.search(rf'^{key} = "(.*)"', project, re.M).group(1) for key in ("version", "description", "requires-python")
    )
    tag = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")
    info = f"{NAME}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {version}\nSummary: {summary}\nRequires-Python: {python}\n"
    with tempfile.TemporaryDirectory() as room:
        tree = Path(os.environ.get("KVWARP_TREE") or room)
        if not (tree / "lib/libkvwarp.so.1").exists():
            subprocess.run([HERE.parent / "build", tree], check=True)
        files = {f"{NAME}/{path.name}": path.read_bytes() for path in sorted((HERE / NAME).glob("*.py"))}
        files[f"{NAME}/kvwarp.h"] = (tree / "include/kvwarp.h").read_bytes()
        files[f"{NAME}/libkvwarp.so.1"] = (tree / "lib/libkvwarp.so.1").read_bytes()
    files[f"{info}/METADATA"] = metadata.encode()
    files[f"{info}/WHEEL"] = f"Wheel-Version: 1.0\nGenerator: {NAME}\nRoot-Is-Purelib: false\nTag: {tag}\n".encode()
    record = f"{info}/RECORD"
    digest = lambda data: base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    lines = [f"{name},sha256={digest(data)},{len(data)}" for name, data in files.items()]
    files[record] = "\n".join([*lines, f"{record},,", ""]).encode()
    wheel = f"{NAME}-{version}-{tag}.whl"
    with zipfile.ZipFile(Path(wheel_directory) / wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data, zipfile.ZIP_DEFLATED)
    return wheel
