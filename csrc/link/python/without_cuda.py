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

    versions = {"": set()}  # names of symbols by version
    for library in libraries:
        of_missing = set()
        for file, names in re.findall(r"File: (\S+) .*\n((?:.*  Name: .*\n)*)", output("readelf", "-VW", library)):
            if file in missing:
                of_missing.update(re.findall(r"Name: (\S+)", names))
        versions.update({v: versions.get(v, set()) for v in of_missing})
        for name, version in re.findall(r" U (\w+)@?(\S*)$", output("nm", "-D", "-u", library), re.M):
            if version in of_missing or (not version and re.match(r"(cuFile|cu[a-z]+[A-Z]|nccl|nv)", name)):
                versions[version].add(name)

    with tempfile.TemporaryDirectory() as room:
        source, script = Path(room) / "none.c", Path(room) / "none.map"
        lines, nodes, number = ["void abort(void);"], [], 0
        for version, names in versions.items():
            number = number + 1
            for name in sorted(names):
                lines.append(f"void none_{number}_{name}(void) {{ abort(); }}")
                lines.append(f'__asm__(".symver none_{number}_{name}, {name}@@{version}");' if version else
                             f"void {name}(void) {{ abort(); }}")  # fmt: skip
            if version:
                nodes.append(f"{version} {{ }};")
        source.write_text("\n".join(lines))
        script.write_text("\n".join(nodes))
        subprocess.run(["cc", "-shared", "-fPIC", "-w", source, "-o", folder / "libnone.so", f"-Wl,--version-script={script}"],
                       check=True)  # fmt: skip
    for name in missing:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("libnone.so")


main(sys.argv[1])
