"""The commands that are clients of a server: `chat`, `bench` and `batch`. Their arguments, and the way to what runs
them; imports what a command needs only when it runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

DEFAULT_URL = "http://127.0.0.1:8000"
SHELLS = ("bash", "zsh", "fish")
CLIENT_COMMANDS = ("chat", "bench", "batch")


def add_server(parser: argparse.ArgumentParser, default_url: str | None = DEFAULT_URL) -> None:
    """Where the server is, and the key that it wants."""
    parser.add_argument(
        "--url", default=default_url, metavar="URL", help=f"where it is served (default: {DEFAULT_URL})"
    )
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help="key, if the server wants one (default: the variable PHALANX_API_KEY, or OPENAI_API_KEY)",
    )


def add_client_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `chat`, `bench` and `batch`."""
    _add_chat(commands)
    _add_bench(commands)
    _add_batch(commands)


def run_client_command(options: argparse.Namespace) -> int:
    """Runs the one that was asked for; returns its exit code. Raises LauncherError."""
    if options.command == "chat":
        from launcher.chat import chat

        return chat(
            options.url,
            options.model,
            options.system,
            options.max_tokens,
            options.temperature,
            options.api_key,
            options.load,
        )
    if options.command == "bench":
        from launcher.bench import Load, bench

        return bench(
            Load(
                url=options.url,
                model=options.model,
                endpoint=options.endpoint,
                concurrency=options.concurrency,
                requests=options.requests,
                rate=options.rate,
                dataset=options.dataset,
                dataset_path=options.dataset_path,
                input_len=options.input_len,
                output_len=options.output_len,
                ignore_eos=options.ignore_eos,
                temperature=options.temperature,
                seed=options.seed,
                retries=options.retries,
                warmup=options.warmup,
                api_key=options.api_key,
                json_path=options.json,
            )
        )
    from launcher.batch import Batch, run_batch

    return run_batch(
        Batch(
            file=options.file,
            output=options.output,
            url=options.url,
            model=options.model,
            serve_arguments=options.serve_arguments,
            concurrency=options.concurrency,
            retries=options.retries,
            api_key=options.api_key,
        )
    )


def _add_chat(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    chat = commands.add_parser(
        "chat",
        help="talk to a served model",
        description="Talk to a served model. /help lists what can be typed beside questions. An answer goes on when "
        "its world dies, and says so.",
    )
    add_server(chat)
    chat.add_argument("--model", metavar="NAME", help="model to talk to (default: the one that is served)")
    chat.add_argument("--system", metavar="TEXT", help="instructions that come before the conversation")
    chat.add_argument("--max-tokens", type=int, default=1024, metavar="N", help="length of an answer at most")
    chat.add_argument("--temperature", type=float, default=0.7, metavar="T", help="0: always the likeliest")
    chat.add_argument("--load", type=Path, metavar="FILE", help="go on with a conversation that /save wrote")


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    bench = commands.add_parser(
        "bench",
        help="put load on a server and measure it",
        description="Put load on a server with OpenAI's HTTP API, and print times, rates and errors. Prompts of "
        "--dataset random are made of words that are one token each for most models; what the server counted is what "
        "is reported. Exit code 1 if a request failed.",
    )
    add_server(bench)
    bench.add_argument("--model", metavar="NAME", help="model to ask (default: the first one that is served)")
    bench.add_argument(
        "--endpoint",
        choices=("completions", "chat"),
        default="completions",
        help="what is asked (default: completions)",
    )
    bench.add_argument(
        "--concurrency", type=int, default=8, metavar="N", help="most requests at once (default: 8)"
    )
    bench.add_argument(
        "--requests", type=int, default=100, metavar="N", help="how many in all (default: 100)"
    )
    bench.add_argument(
        "--rate",
        type=float,
        default=0.0,
        metavar="R",
        help="requests a second, at random moments; 0: as many as --concurrency lets (default: 0)",
    )
    bench.add_argument(
        "--dataset",
        choices=("random", "sharegpt", "prompts"),
        default="random",
        help="where prompts come from; sharegpt: a JSON file of conversations; prompts: a text, or JSON with "
        "`prompt`, a line (default: random)",
    )
    bench.add_argument("--dataset-path", type=Path, metavar="FILE", help="the file of sharegpt or prompts")
    bench.add_argument(
        "--input-len", type=int, default=128, metavar="N", help="words of a random prompt (default: 128)"
    )
    bench.add_argument(
        "--output-len",
        type=int,
        metavar="N",
        help="tokens of an answer (default: 128, or what the file says)",
    )
    bench.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on behind the end of an answer, so that all have one length; not all servers can (default: yes)",
    )
    bench.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="of the answers (default: 0)"
    )
    bench.add_argument("--seed", type=int, default=0, metavar="S", help="of prompts and moments (default: 0)")
    bench.add_argument(
        "--retries", type=int, default=3, metavar="N", help="further attempts of a request (default: 3)"
    )
    bench.add_argument(
        "--warmup", type=int, default=1, metavar="N", help="requests before the measured ones (default: 1)"
    )
    bench.add_argument("--json", type=Path, metavar="FILE", help="write all figures to a file, too")


def _add_batch(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    batch = commands.add_parser(
        "batch",
        help="answer a file of requests",
        description="Answer files of requests, as OpenAI's batches have them.",
    )
    actions = batch.add_subparsers(
        dest="action", metavar="ACTION", required=True, help="what to do with a file"
    )
    run = actions.add_parser(
        "run",
        help="answer every line of a file",
        description="Answer every line of a JSONL file of OpenAI's batch format. A run that was ended goes on where "
        "it was. Exit code 0: every line has its answer; 1: some failed, see FILE.out.errors.jsonl; 2: the file is "
        "wrong.",
    )
    run.add_argument(
        "file", type=Path, metavar="FILE", help="requests: custom_id, method, url and body a line"
    )
    run.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="where answers go (default: FILE with the ending .out.jsonl)",
    )
    add_server(run)
    run.add_argument(
        "--model",
        metavar="MODEL",
        help="start a server of its own with this model, and end it behind the last line; flags for it go behind --",
    )
    run.add_argument(
        "--concurrency", type=int, default=32, metavar="N", help="most requests at once (default: 32)"
    )
    run.add_argument(
        "--retries", type=int, default=8, metavar="N", help="further attempts of a request (default: 8)"
    )


def split_serve_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands behind -- in `batch run FILE --model MODEL -- FLAGS`, which is for `serve`, taken apart."""
    given = list(arguments)
    if given[:2] != ["batch", "run"] or "--" not in given:
        return given, []
    place = given.index("--")
    return given[:place], given[place + 1 :]
