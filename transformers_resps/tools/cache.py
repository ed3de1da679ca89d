"""`resps cache`: list or remove the compiled code that is stored for later processes."""

import argparse
from datetime import datetime

from ..compilation.packages import FOLDER_VARIABLE, packages_folder, remove_packages, stored_packages


def run(args: argparse.Namespace) -> int:
    """List the stored packages of compiled code, or remove them with `--clear`."""
    folder = packages_folder()
    if folder is None:
        print(f"{FOLDER_VARIABLE} is off: no compiled code is kept.")
        return 0
    packages = stored_packages(folder)
    for package in packages:
        used = datetime.fromtimestamp(package.used).strftime("%Y-%m-%d %H:%M")
        print(f"{package.size / 1e6:7.1f} MB  used {used}  {package.model}: {package.code}")
    total = f"{sum(package.size for package in packages) / 1e6:.1f} MB of compiled code in {folder}"
    if args.clear:
        remove_packages(packages)
        print(f"Removed {total}.")
    else:
        print(f"{total}; `resps cache --clear` removes it.")
    return 0
