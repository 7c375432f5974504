"""Lets torch run on the processor without the CUDA libraries that it names, some 2 GB: python without_cuda.py SITE_PACKAGES

Puts one library of functions that abort beside torch's own, under the names of all that are missing. torch calls none of
them where there is no device. The CUDA runtime itself has to be real.
"""
import re
import subprocess
import sys
import tempfile
from pathlib import Path


def output(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main(packages):
    folder = Path(packages) / "torch/lib"
    libraries = [p for p in sorted(folder.glob("lib*.so*")) if not p.is_symlink() and p.name != "libnone.so"]
    own = {p.name for p in libraries} | {p.name for p in Path(packages).glob("nvidia/*/lib/lib*.so*")}
    needed = {name for p in libraries for name in re.findall(r"NEEDED.*\[(.*)\]", output("readelf", "-d", p))}
    missing = sorted(name for name in needed - own if re.match(r"lib(cu(?!da\.)|nv|nccl)", name))

    functions, versions = set(), set()  # (name, version) of what is called, and versions alone
    for library in libraries:
        files = re.findall(r"File: (\S+) .*\n((?:.*  Name: .*\n)*)", output("readelf", "-VW", library))
        own_versions = {v for file, names in files if file in missing for v in re.findall(r"Name: (\S+)", names)}
        versions |= own_versions
        for name, version in re.findall(r" U (\w+)@?(\S*)$", output("nm", "-D", "-u", library), re.M):
            if version in own_versions or (not version and re.match(r"(cuFile|cu[a-z]+[A-Z]|nccl|nv)", name)):
                functions.add((name, version))

    lines = ["void abort(void);"]
    for i, (name, version) in enumerate(sorted(functions)):
        lines.append(f"void {f'none{i}' if version else name}(void) {{ abort(); }}")
        if version:
            lines.append(f'__asm__(".symver none{i}, {name}@@{version}");')
    with tempfile.TemporaryDirectory() as room:
        source, script = Path(room) / "none.c", Path(room) / "none.map"
        source.write_text("\n".join(lines))
        script.write_text("\n".join(f"{version} {{ }};" for version in sorted(versions)))
        options = ["-shared", "-fPIC", "-w", f"-Wl,--version-script={script}", "-o", folder / "libnone.so"]
        subprocess.run(["cc", *options, source], check=True)
    for name in missing:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("libnone.so")


main(sys.argv[1])
