"""Check the folder of a head or a policy, and publish it.

    python training/publish.py DIR --render                render its card
    python training/publish.py DIR REPO_ID --dry-run       check it, and list what would be uploaded
    python training/publish.py DIR REPO_ID --private       check and upload it
    python training/publish.py DIR REPO_ID --bundle OUT    write the target's files into OUT, with code that decodes
                                                           with what REPO_ID publishes

Nothing is uploaded unless the folder is complete, measured with these weights, and has a matching card. All files go
into one commit. Exit status: 0; 1 if something is wrong with the folder; 2 if the Hub refused.
"""

from runs.announcement import announce


if __name__ == "__main__":
    announce(__doc__)

import argparse
import sys
from pathlib import Path

from publishing import (
    check_folder,
    files_of,
    publish,
    read_artefact,
    target_faults,
    write_bundle,
    write_card,
    write_custom_generate,
)
from transformers_resps.hub.upload import RECIPE, Destination


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of a head or a policy")
    parser.add_argument("repo_id", nargs="?", metavar="REPO_ID", help="owner/name on the Hub")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--dry-run", action="store_true", help="check, and list what would be uploaded")
    parser.add_argument(
        "--render", action="store_true", help="write README.md and custom_generate/ into DIR, and stop"
    )
    parser.add_argument("--bundle", type=Path, metavar="OUT", help="write a bundle into a new folder, and stop")
    parser.add_argument("--target", help="of the bundle: folder or Hub id, by default the one that DIR names")
    args = parser.parse_args(arguments)
    if not args.render and args.repo_id is None:
        parser.error("REPO_ID is missing. Pass it, or --render to write the card only.")
    try:
        return run(args)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(error, file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    if args.render:
        for fault in target_faults(read_artefact(args.folder).target, RECIPE):
            raise ValueError(fault)
        write_custom_generate(args.folder)
        print(f"written: {write_card(args.folder)}")
    elif args.bundle:
        names = write_bundle(args.folder, args.repo_id, args.bundle, args.target)
        print(*names, f"written: {args.bundle}. Upload it with `hf upload OWNER/NAME {args.bundle}`.", sep="\n")
    elif args.dry_run:
        check_folder(args.folder, args.repo_id)
        for name, file in files_of(args.folder, args.repo_id).items():
            size = len(file) if isinstance(file, bytes) else file.stat().st_size
            print(f"{size:12,}  {name}")
        print(f"would be uploaded to {args.repo_id} in one commit")
    else:
        destination = Destination(args.repo_id, private=True if args.private else None)
        print(f"published: {publish(args.folder, destination)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
