"""spills.py LOG SOURCE...: reads ptxas -v out of a build's log; fails if a kernel spills registers, or if a source left no trace in the log."""

import re
import subprocess
import sys

ENTRY = re.compile(r"Function properties for (\S+)")
SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


def main(log: str, sources: list[str]) -> int:
    text = open(log, encoding="utf-8", errors="replace").read()
    kernel, kernels, spilled = "?", 0, []
    for line in text.splitlines():
        if match := ENTRY.search(line):
            kernel = match[1]
        elif match := SPILL.search(line):
            kernels += 1
            if int(match[2]) or int(match[3]):
                spilled.append((kernel, match[2], match[3]))
    missing = [s for s in sources if s + ".o" not in text]
    names = subprocess.run(["c++filt"], input="\n".join(k for k, _, _ in spilled), capture_output=True, text=True, check=True).stdout.splitlines()
    for name, (_, stores, loads) in zip(names, spilled):
        print(f"spills {stores} bytes of stores, {loads} of loads: {name}", file=sys.stderr)
    for source in missing:
        print(f"not compiled in {log}: {source}", file=sys.stderr)
    print(f"{kernels} kernels for sm_90a from {len(sources)} files, {len(spilled)} with spills")
    return 1 if spilled or missing or not kernels else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
