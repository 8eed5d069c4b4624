"""What Python lacks on Windows is missing in each process that has this folder on its path.

`sys.platform` and `os.name` remain. NumPy needs `os.uname` on Linux, so that remains as well.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

ON_WINDOWS = set("""
DirEntry EX_OK F_OK O_APPEND O_CREAT O_EXCL O_RDONLY O_RDWR O_TRUNC O_WRONLY P_NOWAIT P_NOWAITO
P_WAIT PathLike R_OK SEEK_CUR SEEK_END SEEK_SET TMP_MAX W_OK X_OK abort access altsep chdir chmod
close closerange cpu_count curdir defpath device_encoding devnull dup dup2 environ error execl
execle execlp execlpe execv execve execvp execvpe extsep fdopen fsdecode fsencode fspath fstat fsync
ftruncate get_exec_path get_inheritable get_terminal_size getcwd getcwdb getenv getlogin getpid
getppid isatty kill linesep link listdir lseek lstat makedirs mkdir name open pardir path pathsep
pipe popen process_cpu_count putenv read readlink remove removedirs rename renames replace rmdir
scandir sep set_inheritable spawnl spawnle spawnv spawnve stat stat_result statvfs_result strerror
supports_bytes_environ supports_dir_fd supports_effective_ids supports_fd supports_follow_symlinks
symlink system terminal_size times times_result truncate umask uname uname_result unlink unsetenv
urandom utime waitpid waitstatus_to_exitcode walk write
SIGABRT SIGFPE SIGILL SIGINT SIGSEGV SIGTERM SIG_DFL SIG_IGN
default_int_handler getsignal raise_signal set_wakeup_fd signal strsignal valid_signals
""".split())

# What subprocess itself uses on this system it may keep.
subprocess.os, subprocess.signal = SimpleNamespace(**vars(os)), SimpleNamespace(**vars(signal))
os.supports_dir_fd = os.supports_fd = set()
shutil._use_fd_functions = False

join, mask, block, restore = (threading.Thread.join, signal.pthread_sigmask, signal.SIG_BLOCK,
                              signal.SIG_SETMASK)


def join_without_ctrl_c(thread, timeout=None):
    before = mask(block, [signal.SIGINT])
    try:
        join(thread, timeout)
    finally:
        mask(restore, before)


threading.Thread.join = join_without_ctrl_c
for module, names in ((os, os.__all__), (signal, dir(signal))):
    for name in names:
        if name not in ON_WINDOWS and name[0] != "_" and not isinstance(vars(module)[name], type):
            delattr(module, name)
for name in ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog"):
    sys.modules[name] = None  # so that importing it raises ImportError
