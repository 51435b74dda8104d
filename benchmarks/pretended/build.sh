#!/usr/bin/env bash
# Build libraries that pretend to be an H100: kernels, cuBLAS, cuFFT and NCCL only count what is asked of them.
# usage: build.sh PYTHON FOLDER    PYTHON: one with a CUDA build of torch (no GPU needed); FOLDER: where they go
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd); py=$1; mkdir -p "$2/lib"; out=$(cd "$2" && pwd)
site=$("$py" -c 'import importlib.util as u, os; print(os.path.dirname(os.path.dirname(u.find_spec("torch").origin)))')
include=$(dirname "$(find /usr/local/cuda*/include "$site/nvidia" -name driver_types.h 2>/dev/null | while read -r f; do [ -e "$(dirname "$f")/crt/host_defines.h" ] && echo "$f"; done | head -1)")
nm -D --undefined-only "$site"/torch/lib/*.so | awk '{print $NF}' | sed 's/@.*//' \
  | grep -E '^(_*cuda|nccl|cublas|cufft)' | sort -u > "$out/wanted.txt"
"$py" "$here/stubs.py" "$out/wanted.txt" "$here/runtime.c" "$out/stubs.c"
gcc -w -O1 -shared -fPIC -I"$include" -o "$out/libfakecuda.so" "$here/runtime.c" "$out/stubs.c" -ldl
gcc -w -O1 -shared -fPIC -o "$out/lib/libcuda.so.1" "$here/driver.c"
cat > "$out/run" <<R
#!/usr/bin/env bash
# run a command on the pretended GPU, e.g. run python -c 'import torch; print(torch.cuda.get_device_name())'
export FAKECUDA="$out/libfakecuda.so" LD_LIBRARY_PATH="$out/lib:\${LD_LIBRARY_PATH:-}" LD_PRELOAD="$out/libfakecuda.so"
exec "\$@"
R
chmod +x "$out/run"; echo "built in $out"
