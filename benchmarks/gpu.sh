#!/usr/bin/env bash
# Everything that needs a GPU, in one go: benchmarks/gpu.sh [options] [step ...]
#
#   --wheels FOLDER   install the wheels in it first (no index, no dependencies), torchao for one
#   --python PYTHON   the interpreter that has torch; default python3
#   --seconds N       stop after so many seconds; default 580
#   --dry-run         print the commands and run nothing
#   step              smoke pytest memcheck racecheck tune quick bench; default these, in this order
#                     block tiles accuracy: only by name, with most of the time for themselves, as in
#                     benchmarks/gpu.sh --wheels FOLDER block accuracy
#
# accuracy trains the model of small_llama.py first, unless a run before on this machine did: where the time is not
# enough for both, call it again. No step stops another; each has its own time limit. Logs, a summary and the JSON go to
# $OUT, or to gpu-out.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

python=python3 wheels="" seconds=580 dry="" steps=()
while [ $# -gt 0 ]; do
    case $1 in
    --wheels | --python | --seconds)
        [ $# -ge 2 ] || { echo "$1 needs a value" >&2; exit 2; }
        case $1 in --wheels) wheels=$2 ;; --python) python=$2 ;; --seconds) seconds=$2 ;; esac
        shift ;;
    --dry-run) dry=1 ;;
    smoke | pytest | memcheck | racecheck | tune | quick | bench | block | tiles | accuracy) steps+=("$1") ;;
    *) echo "unknown: $1 (see the head of $0)" >&2; exit 2 ;;
    esac
    shift
done
case $seconds in '' | *[!0-9]*) echo "--seconds takes a whole number, not '$seconds'" >&2; exit 2 ;; esac
[ -z "$wheels" ] || [ -d "$wheels" ] || { echo "no folder of wheels: $wheels" >&2; exit 2; }
[ ${#steps[@]} -gt 0 ] || steps=(smoke pytest memcheck racecheck tune quick bench)

out=${OUT:-gpu-out}
site=${TMPDIR:-/tmp}/hwpq_fx-site-$$
log=$out/log.txt
summary=$out/summary.txt
cli=("$python" -c 'from hwpq_fx.cli import main; main(prog_name="hwpq-fx")')
# results of the same code on the same kind of GPU are added to
results=(--out "$out/results" --readme "$out/no-readme")
sanitizer=(compute-sanitizer --error-exitcode 9 --target-processes application-only)
check=("$python" benchmarks/sanitize.py)
# these import their neighbours in benchmarks/
script=(env -u PYTHONSAFEPATH "$python")
# the repository's own folder is no package by itself: passes and kernels lie beside hwpq_fx
export PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1

left() { echo $((seconds - SECONDS)); }

say() { printf '%-10s %-22s %5ss\n' "$1" "$2" "$3" | tee -a "$summary"; }

# step NAME LIMIT COMMAND...
step() {
    local name=$1 limit=$2 began=$SECONDS code
    shift 2
    if [ -n "$dry" ]; then
        printf '%-10s at most %3ss  %s\n' "$name" "$limit" "$(printf '%q ' "$@")"
        return
    fi
    # room for the last step's end
    [ "$limit" -le $(($(left) - 12)) ] || limit=$(($(left) - 12))
    if [ "$limit" -lt 10 ]; then
        say "$name" "no time left" 0
        return
    fi
    printf '\n===== %s: %s\n' "$name" "$*" >>"$log"
    timeout -k 10 "$limit" "$@" >>"$log" 2>&1
    code=$?
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

if [ -z "$dry" ]; then
    mkdir -p "$out/results" "$site" && : >"$log" && : >"$summary" || exit 1
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
    if [ -n "$wheels" ]; then
        "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl >>"$log" 2>&1 ||
            say wheels "not installed" $SECONDS
    fi
    arrange >>"$log" 2>&1
    for module in torch triton torchao transformers click rich platformdirs pytest hypothesis hwpq_fx; do
        "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$module') is None)" || say "$module" "is not there" 0
    done
    for file in benchmarks/results/*.json; do
        grep -q '"ceilings"' "$file" 2>/dev/null && cp "$file" "$out/results/"
    done
    nvidia-smi >>"$log" 2>&1
else
    [ -z "$wheels" ] || echo "install    $python -m pip install --no-index --no-deps --target $site $wheels/*.whl"
    echo "install    $python -m pip install -e . --no-deps --no-build-isolation, or links in $site"
fi

for name in "${steps[@]}"; do
    case $name in
    smoke) step smoke 45 "${check[@]}" --quick ;;
    pytest) step pytest 140 "$python" -m pytest -m gpu -q --maxfail=25 -k "not sanitizer" --continue-on-collection-errors -p no:cacheprovider ;;
    memcheck) step memcheck 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${sanitizer[@]}" --tool memcheck "${check[@]}" --quick ;;
    racecheck) step racecheck 60 "${sanitizer[@]}" --tool racecheck "${check[@]}" --quick ;;
    tune) step tune 80 "${cli[@]}" tune --quick --model llama-3-8b ;;
    quick) step quick 130 "${cli[@]}" bench --quick --budget 110 "${results[@]}" ;;
    block) step block 150 "${script[@]}" benchmarks/block.py --device cuda --out "$out/results/block.json" ;;
    tiles) step tiles 300 "${script[@]}" benchmarks/tiles.py --seconds 280 --out "$out/results/tiles.json" ;;
    accuracy)
        step train 330 "${script[@]}" benchmarks/small_llama.py --device cuda --seconds 200
        step accuracy "$seconds" "${script[@]}" benchmarks/accuracy.py --device cuda --out "$out/results/accuracy-cuda.json"
        ;;
    bench) step bench "$seconds" "${cli[@]}" bench --budget "$([ -n "$dry" ] && echo "$seconds" || echo $(($(left) - 40)))" "${results[@]}" ;;
    esac
done

if [ -z "$dry" ]; then
    "$python" -c 'import shutil, sys, torch
from hwpq_fx.kernels.table import user_table_file
shutil.copy(user_table_file(torch.cuda.get_device_name()), sys.argv[1])' "$out/table.json" 2>>"$log"
    rm -rf "$site"
    printf '\n'
    grep -E '^(BAD|not launched|FAILED|ERROR|=+ .*(passed|failed))|ERROR SUMMARY|RACECHECK SUMMARY' "$log" | cut -c1-160 | tail -40
    grep -A 18 ': LLaMA-3-8B$' "$log" | tail -19
    grep -E '^(block|tiles|parameters|perplexity|dense|seed) ' "$log" | cut -c1-160 | tail -70
    printf '\n'
    cat "$summary"
fi
