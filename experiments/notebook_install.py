# Installs aitok_jax where it is missing, as in Colab, beside the JAX and the TensorFlow that are there.
import json
import shutil
import subprocess
import sys
from importlib import util

SOURCE = ".."  # the package: the folder of its checkout, a wheel, or an address that pip takes (git+https://...)


def pip_install(*words):
    command = [sys.executable, "-m", "pip", "install", "-q", *words]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"pip could not install aitok_jax from SOURCE={SOURCE!r}; give the folder of its checkout, a wheel, or an "
            f"address such as git+https://...:\n{done.stderr}"
        )
    return done.stdout


if util.find_spec("aitok_jax") is None:
    report = json.loads(pip_install("--dry-run", "--no-deps", "--report=-", SOURCE))
    needed = [each for each in report["install"][0]["metadata"]["requires_dist"] if "extra ==" not in each]
    if util.find_spec("tensorflow"):  # tensorflow-cpu would write over it
        needed = [each for each in needed if not each.startswith("tensorflow-cpu")]
    if shutil.which("nvidia-smi"):  # where the JAX that is there is too old, the new one has CUDA too
        needed.append("jax[cuda13]" if util.find_spec("jax_cuda13_plugin") else "jax[cuda12]")
    pip_install(*needed)
    pip_install("--no-deps", SOURCE)
