#!/usr/bin/env bash
# Everything that needs a GPU, in one go: benchmarks/gpu.sh [options] [step ...]
#
#   --wheels FOLDER   install the wheels in it first (no index, no dependencies)
#   --state FOLDER    go on from what an earlier call left in $OUT: its results, its table, its compiled code
#   --python PYTHON   the interpreter that has torch; default python3
#   --seconds N       stop after so many seconds; default 580
#   --dry-run         print the commands and run nothing
#   step              smoke cuts tune quick generate pytest memcheck racecheck block bench; default all of these, in
#                     this order; accuracy only by name
#
# A machine that comes bare with torch, triton and transformers most likely lacks torchao and platformdirs, and maybe
# filelock, click, rich, hypothesis, pytest-xdist:
#
#   pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 -d .whl \
#       torchao==0.18.0 platformdirs
#
# In calls of ten minutes, each on a machine that is bare again, .state being a copy of what the call before left in $OUT
# (nothing that counts in machine.sources may change in between, or bench starts over). For a quarter of an hour of one
# GPU, its start included; the second call wants the machine while it is still there:
#
#   benchmarks/gpu.sh --wheels .whl --seconds 570 smoke block tune quick
#   benchmarks/gpu.sh --wheels .whl --state .state --seconds 150 generate
#
# and for half an hour:
#
#   benchmarks/gpu.sh --wheels .whl smoke cuts tune quick
#   benchmarks/gpu.sh --wheels .whl --state .state generate
#   benchmarks/gpu.sh --wheels .whl --state .state --seconds 340 pytest memcheck racecheck block bench
#
# quick, generate and bench add to one file and leave out what it has. accuracy trains the model of small_llama.py
# first, unless a run before on this machine did: where the time is not enough for both, call it again. No step stops
# another; each has its own time limit. Logs, a summary, the table that tune made (table/) and the JSON (results/) go to
# $OUT, or to gpu-out, and compiled code in cache.tgz where that is less than 16 MiB. Exits with 1 where a step was not ok.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

every=(smoke cuts tune quick generate pytest memcheck racecheck block bench)
python=python3 wheels="" state="" seconds=580 dry="" steps=()
while [ $# -gt 0 ]; do
    case $1 in
    --wheels | --state | --python | --seconds)
        [ $# -ge 2 ] || { echo "$1 needs a value" >&2; exit 2; }
        case $1 in --wheels) wheels=$2 ;; --state) state=$2 ;; --python) python=$2 ;; --seconds) seconds=$2 ;; esac
        shift ;;
    --dry-run) dry=1 ;;
    smoke | cuts | tune | quick | generate | pytest | memcheck | racecheck | block | bench | accuracy) steps+=("$1") ;;
    *) echo "unknown: $1 (see the head of $0)" >&2; exit 2 ;;
    esac
    shift
done
case $seconds in '' | *[!0-9]*) echo "--seconds takes a whole number, not '$seconds'" >&2; exit 2 ;; esac
[ -z "$wheels" ] || [ -d "$wheels" ] || { echo "no folder of wheels: $wheels" >&2; exit 2; }
[ -z "$state" ] || [ -d "$state/results" ] || { echo "no results of an earlier call in $state" >&2; exit 2; }
[ ${#steps[@]} -gt 0 ] || steps=("${every[@]}")

out=${OUT:-gpu-out}
site=${TMPDIR:-/tmp}/hwpq_fx-site-$$
# the same folder in every call: what Inductor wrote names files of its own
cache=${TMPDIR:-/tmp}/hwpq_fx-cache-$(id -u)
log=$out/log.txt
summary=$out/summary.txt
failed=0
cli=("$python" -c 'from hwpq_fx.cli import main; main(prog_name="hwpq-fx")')
# results of the same code on the same kind of GPU are added to
results=(--out "$out/results" --readme "$out/no-readme")
sanitizer=(compute-sanitizer --error-exitcode 9 --target-processes application-only --report-api-errors no)
check=("$python" benchmarks/sanitize.py --quick)
# these import their neighbours in benchmarks/
script=(env -u PYTHONSAFEPATH "$python")
# Eight workers share the GPU: none of these tests takes more than a few GiB. They go by the default table, as in
# rehearsal; other steps run what is left out
tests=(env XDG_CACHE_HOME="$site" TORCHINDUCTOR_COMPILE_THREADS=2 OMP_NUM_THREADS=2 "$python" -m pytest -m gpu -v --tb=short --maxfail=25
    -k "not sanitizer and not every_contender" --continue-on-collection-errors -p no:cacheprovider)
# the repository's own folder is no package by itself: passes and kernels lie beside hwpq_fx
export PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1 COLUMNS=180
# the table of tune, and compiled code
export XDG_CACHE_HOME=$cache TORCHINDUCTOR_CACHE_DIR=$cache/inductor TRITON_CACHE_DIR=$cache/triton

left() { echo $((seconds - SECONDS)); }

# budget MOST: seconds after which bench begins nothing new
budget() {
    local most=$1 now=$(($(left) - 60))
    [ -z "$dry" ] && [ "$now" -lt "$most" ] && most=$now
    echo $((most > 1 ? most : 1))
}

say() { printf '%-10s %-22s %5ss\n' "$1" "$2" "$3" | tee -a "$summary"; }

# step NAME LIMIT COMMAND...
step() {
    local name=$1 limit=$2 began=$SECONDS code
    shift 2
    if [ -n "$dry" ]; then
        printf '%-10s at most %3ss  %s\n' "$name" "$limit" "$(printf '%q ' "$@")"
        return
    fi
    # room for the last step's end, and to pack up
    [ "$limit" -le $(($(left) - 25)) ] || limit=$(($(left) - 25))
    if [ "$limit" -lt 10 ]; then
        failed=1
        say "$name" "no time left" 0
        return
    fi
    printf '\n===== %s: %s\n' "$name" "$*" >>"$log"
    # as Ctrl-C would: pytest then says what failed
    timeout -s INT -k 15 "$limit" "$@" >>"$log" 2>&1
    code=$?
    [ $code -eq 0 ] || failed=1
    case $code in
    0) say "$name" ok $((SECONDS - began)) ;;
    124 | 137) say "$name" "stopped at its limit" $((SECONDS - began)) ;;
    127) say "$name" "no such command" $((SECONDS - began)) ;;
    *) say "$name" "exit $code" $((SECONDS - began)) ;;
    esac
}

# Installed where pip can, else put together from links: hwpq_fx with passes and kernels inside
arrange() {
    "$python" -m pip install -q -e . --no-deps --no-build-isolation && "$python" -c 'import hwpq_fx.kernels' && return
    mkdir -p "$site/hwpq_fx" && ln -sfn "$PWD"/hwpq_fx/* "$PWD/kernels" "$PWD/passes" "$site/hwpq_fx/"
}

# Without these every step would fail by itself
check_packages() {
    local why missing
    why=$("$python" -c 'import hwpq_fx.bench.command, torchao' 2>&1) && return
    printf '%s\n' "$why" >>"$log"
    missing=$("$python" -c 'import importlib.util as u, sys; print(*(n for n in sys.argv[1:] if u.find_spec(n) is None))' \
        torch torchao transformers safetensors triton click filelock platformdirs rich 2>>"$log")
    if [ -n "$missing" ]; then
        echo "not there: $missing; get wheels (pip download --no-deps --platform manylinux_2_28_x86_64, see the head of" \
            "$0) and name their folder: --wheels FOLDER"
    else
        echo "hwpq_fx or torchao cannot be imported: $(printf '%s\n' "$why" | tail -1)"
    fi | tee -a "$summary" >&2
    return 1
}

# Compiled code, for the next call's --state
pack() {
    local file=$out/cache.tgz
    timeout 15 tar -C "$cache" -czf "$file" inductor triton 2>>"$log" && [ "$(stat -c %s "$file")" -le $((16 << 20)) ] && return
    rm -f "$file"
    echo "compiled code is left out: more than 16 MiB, more than 15 s to pack, or none" | tee -a "$log"
}

if [ -z "$dry" ]; then
    mkdir -p "$out/results" "$out/table" "$site" "$cache"/{hwpq_fx,inductor,triton} && : >"$log" && : >"$summary" || exit 1
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
    if [ -n "$wheels" ]; then
        "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl >>"$log" 2>&1 ||
            say wheels "not installed" $SECONDS
    fi
    arrange >>"$log" 2>&1
    check_packages || { rm -rf "$site"; exit 1; }
    "$python" -c 'import xdist' 2>>"$log" && tests+=(-n 8 --dist worksteal)
    for file in benchmarks/results/*.json; do
        grep -q '"ceilings"' "$file" 2>/dev/null && cp "$file" "$out/results/"
    done
    if [ -n "$state" ]; then
        cp --no-preserve=mode "$state"/results/*.json "$out/results/" 2>>"$log"
        cp --no-preserve=mode "$state"/table/*.json "$cache/hwpq_fx/" 2>>"$log"
        [ ! -f "$state/cache.tgz" ] || tar -C "$cache" -xzf "$state/cache.tgz" 2>>"$log"
    fi
    nvidia-smi >>"$log" 2>&1
else
    [ -z "$wheels" ] || echo "install    $python -m pip install --no-index --no-deps --target $site $wheels/*.whl"
    echo "install    $python -m pip install -e . --no-deps --no-build-isolation, or links in $site"
fi

for name in "${steps[@]}"; do
    case $name in
    smoke) step smoke 90 "${check[@]}" ;;
    cuts) step cuts 120 "${script[@]}" benchmarks/cuts.py --seconds 90 --out "$out/results/cuts.json" ;;
    tune) step tune 150 "${cli[@]}" tune --quick --no-peers --model llama-3-8b ;;
    quick) step quick 320 "${cli[@]}" bench --quick --budget "$(budget 280)" "${results[@]}" ;;
    generate) step generate "$seconds" "${cli[@]}" bench --only generate --model llama-3-8b --budget "$(budget "$seconds")" "${results[@]}" ;;
    pytest) step pytest 160 "${tests[@]}" $(grep -l 'mark\.gpu' tests/test_*.py) ;;
    memcheck) step memcheck 110 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${sanitizer[@]}" --tool memcheck "${check[@]}" --own ;;
    racecheck) step racecheck 110 "${sanitizer[@]}" --tool racecheck "${check[@]}" --own ;;
    block) step block 120 "${script[@]}" benchmarks/block.py --device cuda --out "$out/results/block.json" ;;
    bench) step bench "$seconds" "${cli[@]}" bench --budget "$(budget "$seconds")" "${results[@]}" ;;
    accuracy)
        step train 330 "${script[@]}" benchmarks/small_llama.py --device cuda --seconds 200
        step accuracy "$seconds" "${script[@]}" benchmarks/accuracy.py --device cuda --out "$out/results/accuracy-cuda.json"
        ;;
    esac
done

if [ -z "$dry" ]; then
    cp "$cache"/hwpq_fx/*.json "$out/table/" 2>>"$log"
    pack
    rm -rf "$site"
    printf '\n'
    grep -E '^(BAD|not launched|FAILED|ERROR|\[gw.*(FAILED|ERROR)|=+ .*(passed|failed))|ERROR SUMMARY|RACECHECK SUMMARY' "$log" | cut -c1-140 | tail -50
    grep -A 20 ": LLaMA-3-8B *\$" "$log" | tail -21
    grep -E '^(block|cuts|gemv|tiles|tiles_fp8|parameters|perplexity|dense|seed) ' "$log" | cut -c1-140 | tail -50
    printf '\n'
    cat "$summary"
fi
exit $failed
