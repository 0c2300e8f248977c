#!/usr/bin/env bash
# General distillation.  Two ways to start it:
#
#     deepspeed [LAUNCHER OPTIONS] launch/general.sh [OPTIONS]
#     [DS_ARGS="LAUNCHER OPTIONS"] bash launch/general.sh [OPTIONS]
#
# DeepSpeed runs the file it is given with `python -u FILE` on every rank, so this file is read by both languages:
# bash sees a no-op (''':') and then a script that ends in a here document, Python sees one long string and then a program.
''':'
case " $* " in *" --help "* | *" -h "* | *" --dry-run "*) exec python "$0" "$@" ;; esac
if [ -n "${LOCAL_RANK-}" ]; then exec python -u "$0" "$@"; fi  # already a rank

# DeepSpeed's launchers orphan the ranks on SIGTERM, or hurry them one after another.  So they run in a process group of
# their own and ignore SIGUSR1, which the ranks take as: end the step, save, exit with 75.  A second signal kills them.
trap '' USR1
# With --hostfile pdsh waits for every host; ssh notices in a minute that one is gone.
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND--o ServerAliveInterval=15 -o ServerAliveCountMax=4}"
elsewhere() {  # SIGUSR1 on the hosts of a hostfile: each of pdsh's ssh commands again, with another end
    for ssh in $(pgrep -P "$(pgrep -g "$group" pdsh)" -x ssh); do
        command=$(tr '\0' ' ' < "/proc/$ssh/cmdline")
        run=$(echo "$command" | grep -o -e '--world_info=[^ ]*') port=$(echo "$command" | grep -o -e '--master_port=[0-9]*')
        ${command%% export *} "pkill -USR1 -P \"\$(pgrep -d, -f '[l]auncher.launch $run .*$port ')\"" &
        wait $!
    done
}
level=error
case " $* " in *" --verbose "*) level=info ;; esac
setsid deepspeed --log_level $level ${DS_ARGS-} "$0" "$@" &
group=$! signals=0
trap 'signals=$((signals + 1))' TERM INT HUP
left() { kill -0 "$group" || kill -0 -- "-$group"; } 2>/dev/null
wait "$group"  # until it ends, or a signal comes
code=$?
while left; do
    if [ "$signals" -ge 2 ]; then kill -KILL -- "-$group"; fi
    if [ "$signals" -eq 1 ]; then
        kill -USR1 -- "-$group"  # each second: the ranks may not have been there yet
        elsewhere
    fi
    sleep 1 &
    wait $!
    if [ "$code" -eq 0 ] && left; then code=1; fi  # deepspeed says 0 where its launch.py was killed and the ranks were not
done 2>/dev/null
if [ "$signals" -gt 0 ]; then wait "$group"; code=$?; fi
exit "$code"
: <<'# end of Python'
'''
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

if __name__ == "__main__":
    from pretrain.general import main

    if "--dry-run" in sys.argv:
        from launch.budget import dry_run as work
    else:
        work = None
    main(work=work)
# end of Python
