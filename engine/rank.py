"""Entry point of a rank: join the world, load the stage, run the step loop.

Started by a guard (`launcher.guard`) or by `mpirun -np N python -m engine.rank ...` itself. The only module of
the engine that knows the gateway and the progress page. Exit code 78 means that no relaunch can help.
"""

from __future__ import annotations

import argparse
import importlib
import os
import secrets
import signal
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from engine.early_imports import import_at_low_priority
from engine.models import echo_model
from engine.plan import LogitShaping, Pooling, PoolingKind, SequenceParams, TokenLogprobs
from engine.rank_arguments import parse_arguments
from engine.rank_end import die, say
from engine.scheduling.scheduler import NewToken
from engine.scheduling.sequence import Sequence
from engine.stacks import dump_stacks_on_signal
from gateway.curve import ServerKeys, is_local
from gateway.errors import EndpointError
from gateway.protocol import Limits, Output, Submit
from gateway.protocol import Pooling as WirePooling
from gateway.protocol import TokenLogprobs as WireLogprobs
from gateway.rank0 import Rank0Gateway
from launcher.lease_watch import die_with_lease
from launcher.watch import FactSheet, Phase, ProgressPage, SpareKind, StartGate, die_with_parent

if TYPE_CHECKING:
    # What imports torch is imported once the progress page says so: see _run.
    from engine.backends.echo import EchoLoop
    from engine.faults import Faults
    from engine.step_loop import Key, Leader, Status

_NO_SHAPING = LogitShaping()


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    page_path = os.environ.get("PHALANX_PROGRESS_PAGE")
    if page_path:
        die_with_parent()
    page = ProgressPage.open(Path(page_path) if page_path else None)
    die_with_lease(page)
    facts = FactSheet(Path(page_path) if page_path else None)
    gate = StartGate.from_environment()
    faults = None
    try:
        dump_stacks_on_signal()
        if "PHALANX_FAULTS" in os.environ:
            from engine.faults import Faults

            faults = Faults.from_environment(arguments.epoch, page)
        if echo_model.is_echo(arguments.model):
            _run_echo(arguments, page, gate)
        else:
            _run(arguments, page, gate, faults, facts)
    except BaseException as error:
        die(error)


def _run(
    arguments: argparse.Namespace,
    page: ProgressPage,
    gate: StartGate,
    faults: Faults | None,
    facts: FactSheet,
) -> None:
    page.enter(Phase.IMPORTING)
    # Read when OpenMP is loaded. Threads that spin for milliseconds hold up the ones that they wait for wherever
    # cores are shared with anything else.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    modules = ["torch", "engine.collectives.mpi", "engine.engine", "engine.step_loop"]
    if arguments.backend == "deepspeed":
        modules.append("engine.backends.preload")
    if not gate.is_open():
        import_at_low_priority(modules, gate.is_open)
    import torch

    from engine.collectives.mpi import join_world
    from engine.engine import EngineSettings, load_engine
    from engine.facts import model_facts, software_facts
    from engine.kernels import library as kernels
    from engine.step_loop import Leader, follow

    for name in modules:
        importlib.import_module(name)
    facts.tell(software_facts())
    cuda = arguments.device == "cuda" or (arguments.device == "auto" and torch.cuda.is_available())
    if not cuda:
        kernels.find()
    if gate.kind is SpareKind.WARM:
        _park(page, gate)
    page.enter(Phase.JOINING)
    world = join_world(arguments.tp, arguments.pp, cuda, page.collective, page.collective_words())
    torch.set_num_threads(arguments.threads or _default_threads(world.local_size))
    page.enter(Phase.LOADING)
    settings = EngineSettings(
        model_dir=arguments.model,
        shard_cache=arguments.shard_cache,
        dtype=arguments.dtype,
        max_model_len=arguments.max_model_len,
        max_num_seqs=arguments.max_num_seqs,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        kv_cache_bytes=arguments.kv_cache_memory,
        kv_cache_blocks=arguments.kv_cache_blocks,
        step_factor=arguments.step_factor,
        memory_share=arguments.memory_share,
        backend=arguments.backend,
        expert_parallel=arguments.expert_parallel,
        quantization=arguments.quantization,
        kernels=arguments.kernels,
        deterministic=arguments.deterministic,
    )
    device = torch.device("cuda", world.local_rank) if cuda else torch.device("cpu")
    loaded = load_engine(world, settings, device, page.load)
    facts.tell(model_facts(arguments.model, arguments.shard_cache))
    page.hold_kv_blocks(loaded.num_blocks)
    world.control.barrier()
    if gate.kind is SpareKind.HOT:
        _park(page, gate)
        page.enter(Phase.LOADING)
    engine = loaded.reserve_cache()
    if world.at.rank == 0:
        say(f"computed by {engine.computed_by}")
    if faults is not None:
        faults.watch_engine(world, engine.runner)
    if engine.runner.sampler is not None:
        engine.runner.sampler.show_progress_to(page.collective)
    sign = _PageSign(page)
    if world.at.rank != 0:
        # The stop plan ends this rank; until it comes, rank 0 may still need it.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        follow(world, engine.runner, sign)
    else:
        limits = Limits(
            max_model_len=engine.limits.max_model_len,
            kv_cache_tokens=engine.kv_cache_tokens,
            max_num_seqs=engine.limits.max_num_seqs,
            vocab_size=engine.config.vocab_size,
            hidden_size=engine.config.hidden_size,
        )
        gateway = _open_gateway(arguments, limits, engine.config.eos_token_ids)
        port = _GatewayPort(gateway, engine.config.eos_token_ids)
        leader = Leader(world, engine.new_scheduler(world.at.pp), engine.runner, port, sign)
        _serve(arguments, page, gateway, leader)
    page.enter(Phase.STOPPING)
    world.control.close()


def _run_echo(arguments: argparse.Namespace, page: ProgressPage, gate: StartGate) -> None:
    """A world of one rank without a model, and so without MPI."""
    page.enter(Phase.IMPORTING)
    from engine.backends.echo import EchoLoop, step_s

    if gate.kind is not SpareKind.NONE:
        _park(page, gate)
    page.enter(Phase.LOADING)
    page.hold_kv_blocks(1)
    max_model_len = arguments.max_model_len or echo_model.MAX_MODEL_LEN
    limits = Limits(max_model_len, echo_model.KV_CACHE_TOKENS, arguments.max_num_seqs, echo_model.VOCAB_SIZE)
    end_token_ids = [echo_model.END_TOKEN_ID]
    gateway = _open_gateway(arguments, limits, end_token_ids)
    loop = EchoLoop(_GatewayPort(gateway, end_token_ids), _PageSign(page), step_s())
    _serve(arguments, page, gateway, loop)
    page.enter(Phase.STOPPING)


def _serve(
    arguments: argparse.Namespace, page: ProgressPage, gateway: Rank0Gateway, loop: Leader | EchoLoop
) -> None:
    """Rank 0 says where it listens, and runs its loop until it is told to stop."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        loop.stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    page.serve_at(gateway.endpoint)
    if not os.environ.get("PHALANX_PROGRESS_PAGE"):
        shape = f"(tp {arguments.tp}, pp {arguments.pp})"
        print(f"ready  zmq {gateway.endpoint}  world {arguments.epoch} {shape}", flush=True)
    loop.run()
    gateway.close()


def _park(page: ProgressPage, gate: StartGate) -> None:
    page.enter(Phase.PARKED)
    gate.wait()


def _default_threads(local_size: int) -> int:
    """What the user set, else an even share of the cores that this process may run on."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() else max(1, len(os.sched_getaffinity(0)) // local_size)


def _open_gateway(
    arguments: argparse.Namespace, limits: Limits, eos_token_ids: Iterable[int]
) -> Rank0Gateway:
    if arguments.gateway_curve_dir is None and not (
        arguments.gateway_insecure or is_local(arguments.gateway)
    ):
        raise EndpointError(
            f"--gateway {arguments.gateway} can be reached from other machines: give --gateway-curve-dir DIR "
            "(phalanx curve-keygen DIR makes keys), listen at tcp://127.0.0.1:PORT, or say --gateway-insecure"
        )
    return Rank0Gateway(
        arguments.gateway,
        arguments.epoch,
        arguments.served_model_name or arguments.model.name,
        arguments.tp,
        arguments.pp,
        limits,
        list(eos_token_ids),
        None if arguments.gateway_curve_dir is None else ServerKeys(arguments.gateway_curve_dir),
    )


class _PageSign:
    """Shows the step loop's progress on the page that the guard reads."""

    def __init__(self, page: ProgressPage) -> None:
        self._page = page

    def idle(self) -> None:
        self._page.enter(Phase.IDLE)

    def stepping(self, step: int, num_tokens: int) -> None:
        self._page.step(step, num_tokens)


class _GatewayPort:
    """The step loop's requests, from and to the gateway."""

    def __init__(self, gateway: Rank0Gateway, eos_token_ids: Iterable[int]) -> None:
        self._gateway = gateway
        self._end_token_ids = frozenset(eos_token_ids)
        self._of_client: dict[bytes, set[str]] = {}

    def receive(self, timeout_s: float) -> tuple[list[Sequence], list[Key]]:
        arrivals: list[Sequence] = []
        cancelled: list[Key] = []
        for client in self._gateway.lost_clients():
            cancelled += [(client, request_id) for request_id in self._of_client.pop(client, ())]
        for client, message in self._gateway.receive(timeout_s):
            key = (client, message.request_id)
            if not isinstance(message, Submit):
                cancelled.append(key)
                continue
            self._of_client.setdefault(client, set()).add(message.request_id)
            arrivals.append(self._sequence(key, message))
        return arrivals, cancelled

    def _sequence(self, key: Key, submit: Submit) -> Sequence:
        params = submit.params
        end_token_ids = frozenset() if params.ignore_eos else self._end_token_ids
        stop_token_ids = frozenset(params.stop_token_ids)
        shaping = LogitShaping(
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            logit_bias=params.logit_bias,
            min_tokens=params.min_tokens,
            ending_token_ids=sorted(end_token_ids | stop_token_ids) if params.min_tokens else [],
            bad_words=params.bad_words,
            allowed_token_ids=params.allowed_token_ids,
        )
        return Sequence(
            key=key,
            tokens=[*submit.prompt_token_ids, *submit.output_token_ids],
            num_prompt_tokens=len(submit.prompt_token_ids),
            max_tokens=params.num_new_tokens,
            end_token_ids=end_token_ids,
            stop_token_ids=stop_token_ids,
            params=SequenceParams(
                temperature=params.temperature,
                top_p=params.top_p,
                top_k=params.top_k,
                # The front gives every request a seed, which it journals; a bare client that gave none gets any.
                seed=secrets.randbits(63) if params.seed is None else params.seed,
                choice=params.choice,
                min_p=params.min_p,
                num_logprobs=-1 if params.logprobs is None else params.logprobs,
                num_prompt_logprobs=-1 if params.prompt_logprobs is None else params.prompt_logprobs,
                num_prompt_tokens=len(submit.prompt_token_ids),
                shaping=None if shaping == _NO_SHAPING else shaping,
                grammar=params.grammar,
                pooling=None if params.pooling is None else _to_plan(params.pooling),
            ),
            priority=submit.priority,
            prompt_logprobs=None if params.prompt_logprobs is None else [],
        )

    def send(self, step: int, tokens: list[NewToken]) -> None:
        outputs = []
        for token in tokens:
            client, request_id = token.key
            if token.finish_reason is not None:
                self._of_client.get(client, set()).discard(request_id)
            token_ids = [] if token.token_id is None else [token.token_id]
            outputs.append(
                (
                    client,
                    Output(
                        request_id,
                        token.position,
                        token_ids,
                        token.finish_reason,
                        token.stop_token_id,
                        logprobs=None if token.logprobs is None else [_to_wire(token.logprobs)],
                        prompt_logprobs=None
                        if token.prompt_logprobs is None
                        else [_to_wire(entry) for entry in token.prompt_logprobs],
                        pooled=token.pooled,
                        num_cached_tokens=token.num_cached_tokens,
                    ),
                )
            )
        self._gateway.send_tokens(step, outputs)

    def refuse(self, key: Key, message: str) -> None:
        self._of_client.get(key[0], set()).discard(key[1])
        self._gateway.send_failed(key[0], key[1], "invalid_request", message)

    def report(self, status: Status) -> None:
        self._gateway.send_stats(
            step=status.step,
            num_running=status.num_running,
            num_waiting=status.num_waiting,
            kv_blocks_used=status.kv_blocks_used,
            kv_blocks_total=status.kv_blocks_total,
            num_preemptions=status.num_preemptions,
            prompt_tokens=status.prompt_tokens,
            generation_tokens=status.generation_tokens,
            prefix_cache_queries=status.prefix_cache_queries,
            prefix_cache_hits=status.prefix_cache_hits,
        )


def _to_plan(pooling: WirePooling) -> Pooling:
    return Pooling(PoolingKind(pooling.kind), pooling.normalize, pooling.first_scored)


def _to_wire(entry: TokenLogprobs) -> WireLogprobs:
    return WireLogprobs(entry.token_id, entry.logprob, entry.rank, entry.top_token_ids, entry.top_logprobs)


if __name__ == "__main__":
    main()
