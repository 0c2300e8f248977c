#!/usr/bin/env bash
# General distillation.  Two ways to start it:
#
#     deepspeed [LAUNCHER OPTIONS] launch/general.sh [OPTIONS]
#     [DS_ARGS="LAUNCHER OPTIONS"] bash launch/general.sh [OPTIONS]
#
# DeepSpeed runs the file it is given with `python -u FILE` on every rank, so this file is read by both languages:
# bash sees a no-op (''':') and then a script that ends in exec, Python sees one long string and then a program.
''':'
case " $* " in *" --help "* | *" -h "*) exec python "$0" "$@" ;; esac
if [ -n "${LOCAL_RANK-}" ]; then exec python -u "$0" "$@"; fi  # already a rank
exec deepspeed --log_level error ${DS_ARGS-} "$0" "$@"
: <<'# end of Python'
'''
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

if __name__ == "__main__":
    from pretrain.general import main

    main()
# end of Python
