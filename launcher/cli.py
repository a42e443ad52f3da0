"""The `phalanx` command. Reads arguments and hands over; it imports what a subcommand needs only when that
subcommand runs, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from launcher.cache_command import add_arguments as add_cache_arguments
from launcher.client_commands import (
    CLIENT_COMMANDS,
    SHELLS,
    add_client_commands,
    add_server,
    run_client_command,
    split_serve_arguments,
)
from launcher.errors import LauncherError
from launcher.k8s_render import add_arguments as add_k8s_arguments
from launcher.keys_command import add_arguments as add_key_arguments
from launcher.settings import BACKENDS, MPIS, Settings
from launcher.slurm_render import add_arguments as add_slurm_arguments
from launcher.standard_streams import open_missing


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="phalanx",
        description="Serves language models from an MPI world that may die at any moment, "
        "with requests that never do.",
    )
    parser.add_argument("--version", action="version", version=f"phalanx {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    serve = commands.add_parser("serve", help="serve a model until Ctrl-C", description="Serve a model.")
    Settings.add_arguments(serve)

    add_client_commands(commands)

    status = commands.add_parser("status", help="show worlds and ranks", description="Show worlds and ranks.")
    add_server(status, default_url=None)
    status.add_argument("--port", type=int, default=8000, metavar="P", help="HTTP port that it serves on")
    status.add_argument("--run-dir", type=Path, metavar="DIR", help="its run folder, if it was given one")
    status.add_argument("--job", metavar="ID", help="of Slurm, if it runs as one")
    status.add_argument("--json", action="store_true", help="print what /cluster answers, for programs")

    stop = commands.add_parser(
        "stop",
        help="end a deployment",
        description="End a deployment of this machine, also one whose supervisor was killed.",
    )
    stop.add_argument("--port", type=int, default=8000, metavar="P", help="HTTP port that it serves on")
    stop.add_argument("--run-dir", type=Path, metavar="DIR", help="its run folder, if it was given one")

    reload = commands.add_parser(
        "reload",
        help="change weights or flags while serving",
        description="Starts a new world beside the one that serves, with other weights or flags, moves every request "
        "to it, and ends the old one. No request is dropped; if the new world does not start, the old one goes on. "
        "Needs the memory of both for a while. What is not given stays as it is; clients go on with the same model "
        "name.",
    )
    Settings.add_reload_arguments(reload)
    reload.add_argument(
        "--port", type=int, default=8000, metavar="P", help="HTTP port of the deployment (default: 8000)"
    )
    reload.add_argument("--run-dir", metavar="DIR", help="its run folder, if it was given one")

    key_parser = commands.add_parser(
        "keys", help="make and revoke API keys", description="API keys for --api-key-file."
    )
    add_key_arguments(key_parser)

    pull = commands.add_parser("pull", help="download and import a model", description="Get a model.")
    pull.add_argument("model", metavar="MODEL", help="catalog name, GGUF file or hub id")
    pull.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="what is going to serve it (default: auto)"
    )

    cache_parser = commands.add_parser(
        "cache", help="show and prune cut weights", description="The shard cache: weights as ranks map them."
    )
    add_cache_arguments(cache_parser)

    keygen = commands.add_parser(
        "curve-keygen",
        help="make keys for ZeroMQ",
        description="Makes the server's pair of CURVE keys in DIR if there is none, and one for a client, which "
        "`phalanx serve --zmq-curve-dir DIR` then lets in.",
    )
    keygen.add_argument("folder", metavar="DIR", type=Path, help="folder of keys")
    keygen.add_argument("--client", metavar="NAME", help="make a pair for this client, too")

    doctor = commands.add_parser(
        "doctor", help="check this machine", description="Check what this machine lacks to serve models."
    )
    doctor.add_argument("--port", type=int, default=8000, metavar="P", help="HTTP port that shall be free")
    doctor.add_argument("--mpirun", metavar="PATH", help="the mpirun to check (default: found)")
    doctor.add_argument("--mpi", choices=MPIS, default="auto", help="which MPI it must be of (default: auto)")
    doctor.add_argument(
        "--hosts", default="", metavar="HOSTS", help="measure over these hosts, as serve's --hosts names them"
    )
    doctor.add_argument(
        "--interface", default="", metavar="NAME", help="network interface over which they reach each other"
    )
    doctor.add_argument("--json", action="store_true", help="print findings and figures for programs")

    k8s = commands.add_parser("k8s", help="serve in Kubernetes", description="Deployments in Kubernetes.")
    k8s_commands = k8s.add_subparsers(dest="k8s_command", metavar="COMMAND", required=True, help="render")
    render = k8s_commands.add_parser(
        "render",
        help="print the manifests of a deployment",
        description="Prints what kubectl applies: `phalanx k8s render MODEL --tp 2 --pp 2 | kubectl apply -f -`. "
        "Takes the flags of `phalanx serve`, which go to the launcher.",
    )
    add_k8s_arguments(render)

    slurm = commands.add_parser(
        "slurm", help="serve as a job of Slurm", description="Deployments as jobs of Slurm."
    )
    jobs = slurm.add_subparsers(
        dest="slurm_command", metavar="COMMAND", required=True, help="what to do with one"
    )
    render = jobs.add_parser(
        "render",
        help="print the batch script of a deployment",
        description="Prints a batch script for sbatch: `phalanx slurm render MODEL --tp 4 --nodes 2 > job.sbatch`. "
        "Flags of `phalanx serve` are those of the server in it.",
    )
    add_slurm_arguments(render)

    completion = commands.add_parser(
        "completion",
        help="make the shell complete commands and flags",
        description="Print a script that makes a shell complete phalanx. bash: source <(phalanx completion bash), in "
        "~/.bashrc; zsh: phalanx completion zsh > FOLDER/_phalanx, a folder of $fpath; fish: phalanx completion fish "
        "> ~/.config/fish/completions/phalanx.fish",
    )
    completion.add_argument("shell", choices=SHELLS, help="the shell that shall complete")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns its exit code: 0, 1 for what went wrong, 2 for what was asked wrongly."""
    open_missing()
    own, for_serve = split_serve_arguments(sys.argv[1:] if arguments is None else arguments)
    options = build_parser().parse_args(own)
    options.serve_arguments = for_serve
    try:
        return _run(options)
    except LauncherError as error:
        print(f"phalanx: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one that is held
        return 130
    except BrokenPipeError:  # `phalanx status | head`
        sys.stderr.close()
        return 0


def _run(options: argparse.Namespace) -> int:
    if options.command == "serve":
        settings = Settings.from_arguments(options)
        if options.dry_run:
            from launcher.dry_run import dry_run

            return dry_run(settings)
        from launcher.serve import serve

        return serve(settings, lambda: Settings.from_arguments(options))
    if options.command in CLIENT_COMMANDS:
        return run_client_command(options)
    if options.command == "status":
        from launcher.status import address_of, status

        url = options.url or address_of(options.port, options.run_dir, options.job)
        return status(url, as_json=options.json, api_key=options.api_key)
    if options.command == "slurm":
        from launcher.slurm_render import render as batch_script

        print(batch_script(options), end="")
        return 0
    if options.command == "completion":
        from launcher.completion import completion

        return completion(build_parser(), options.shell)
    if options.command == "k8s":
        from launcher.k8s_render import render, write

        return write(render(options), options.output)
    if options.command == "stop":
        from launcher.stop import stop

        return stop(options.port, options.run_dir)
    if options.command == "reload":
        from launcher.reload_command import reload

        return reload(options)
    if options.command == "keys":
        from launcher.keys_command import keys

        return keys(options)
    if options.command == "pull":
        from launcher.pull import pull

        return pull(options.model, options.backend)
    if options.command == "cache":
        from launcher.cache_command import cache

        return cache(options)
    if options.command == "curve-keygen":
        from launcher.zmq_keys import keygen

        return keygen(options.folder, options.client)
    from launcher.doctor import doctor

    return doctor(
        options.port, options.mpirun, options.mpi, options.hosts, options.interface, as_json=options.json
    )


def _version() -> str:
    try:
        return metadata.version("phalanx-serve")
    except metadata.PackageNotFoundError:  # a checkout that was never installed
        return "0+unknown"


if __name__ == "__main__":
    sys.exit(main())
