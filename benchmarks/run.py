"""Fits and tests one contestant with TorchGeo's command, in a process of its own."""

import sys
from pathlib import Path

from torchgeo.main import main


def run(folder: str, *options: str) -> None:
    """Go on from the last checkpoint if there is one, and test the best one.

    Args:
        folder: Folder of the run.
        options: Options of ``torchgeo fit`` and ``torchgeo test``.
    """
    options = (*options, f'--trainer.default_root_dir={folder}')
    main(['fit', *options, '--ckpt_path=last'])
    main(['test', *options, f'--ckpt_path={Path(folder, "checkpoints", "best.ckpt")}'])


if __name__ == '__main__':
    run(*sys.argv[1:])
