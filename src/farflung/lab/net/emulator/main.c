/* A wide-area network inside one machine, at the level of IP packets.
 *
 *   wan run SOCKET [--lifeline]             routes between the nodes that it reads from stdin, until it is told to quit
 *   wan enter PID FD USERNS -- COMMAND ...  becomes COMMAND inside the network namespace that process PID holds as FD
 *
 * Every node is a network namespace with one TUN interface. The other ends of all TUNs are here, and a packet from A to B passes
 *     A's uplink    FIFO, drained at A's rate, bounded, drops at its tail
 *     the distance  RTT(A, B) / 2 + jitter, losses
 *     B's downlink  FIFO in order of arrival, drained at B's rate, bounded, drops at its tail
 * before it is written into B's TUN. traffic.c does that; nat.c translates addresses; spaces.c makes the namespaces; control.c
 * reads the settings, at the start from stdin (up to a line "start") and then from the unix socket SOCKET.
 *
 * The namespaces have no names in the file system: this process holds them open, and when it ends, however it ends, nothing of
 * them stays. With --lifeline it ends when its stdin closes, that is, with whoever started it. It kills what runs inside first.
 */
#define _GNU_SOURCE
#include "wan.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { CONTROL = MAX_NODES, LIFELINE };

ns_t slack = 20000;
const char *scheduling_name = "";
static volatile sig_atomic_t told_to_end;
static const char *socket_path;

ns_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (ns_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void on_signal(int number) { (void)number; told_to_end = 1; }

static void finish(void) {
    kill_inside();
    unlink(socket_path);
    exit(0);
}

/* One short connection: lines in until the other side has no more, answers out. */
static void serve_control(int listener) {
    int connection = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    if (connection < 0) return;
    struct timeval patience = {2, 0};
    setsockopt(connection, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    setsockopt(connection, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    FILE *in = fdopen(dup(connection), "r"), *out = fdopen(connection, "w");
    char *line = NULL;
    size_t capacity = 0;
    while (getline(&line, &capacity, in) > 0) {
        if (!strcmp(line, "quit\n")) {
            kill_inside();
            unlink(socket_path);
            fprintf(out, "ok\n");
            fflush(out);
            exit(0);
        }
        control_line(line, out);
    }
    free(line);
    fclose(in);
    fclose(out);
}

/* Deadline: up to 0.85 ms in each ms. FIFO alone is held off for 50 ms at a time by the kernel's fair server on a busy machine. */
static const char *take_precedence(void) {
    struct { uint32_t size, policy; uint64_t flags; int32_t nice; uint32_t priority; uint64_t runtime, deadline, period; }
        wanted = {sizeof wanted, 6 /* SCHED_DEADLINE */, 0, 0, 0, 850000, 1000000, 1000000};
    struct sched_param fifo = {.sched_priority = 1};
    for (; wanted.runtime >= 150000; wanted.runtime -= 100000)
        if (!syscall(SYS_sched_setattr, 0, &wanted, 0)) return "deadline";
    if (!sched_setscheduler(0, SCHED_FIFO, &fifo)) return "fifo";
    if (!setpriority(PRIO_PROCESS, 0, -15)) return "nice";
    return "none";
}

static int listen_at(const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path) { fprintf(stderr, "%s: too long for a socket\n", path); exit(1); }
    strcpy(address.sun_path, path);
    unlink(path);
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    umask(077);
    if (bind(listener, (void *)&address, sizeof address) || listen(listener, 64)) { perror(path); exit(1); }
    return listener;
}

static void watch(int epoll, int fd, uint32_t as) {
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = as};
    epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
}

static void handle(int which, int listener) {
    static unsigned char buffer[OFFLOAD_HEADER + 70000];
    if (which == CONTROL) { serve_control(listener); return; }
    if (which == LIFELINE) {
        char rest[256];
        if (read(0, rest, sizeof rest) <= 0) finish();
        return;
    }
    ns_t at = now_ns();
    for (int i = 0; i < 32; i++) {
        ssize_t length = read(nodes[which].tun, buffer, sizeof buffer);
        if (length <= 0) break;
        packet_from(which, buffer, length, at);
        if ((i & 7) == 7) { send_due(); at = now_ns(); }
    }
}

static void serve(int listener, int lifeline) {
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    for (int i = 0; i < node_count; i++) watch(epoll, nodes[i].tun, i);
    watch(epoll, listener, CONTROL);
    if (lifeline) watch(epoll, 0, LIFELINE);
    struct epoll_event events[64];
    for (;;) {
        struct timespec wait, *until = NULL;
        ns_t due = next_due();
        if (due != NONE) {
            ns_t left = due - now_ns() - slack / 2;
            if (left < 0) left = 0;
            wait.tv_sec = left / 1000000000; wait.tv_nsec = left % 1000000000; until = &wait;
        }
        int ready = epoll_pwait2(epoll, events, 64, until, NULL);
        if (told_to_end) finish();
        send_due();
        for (int i = 0; i < ready; i++) handle(events[i].data.u32, listener);
    }
}

/* The next line of stdin, byte by byte: the lifeline must find nothing read ahead. */
static int read_line(char *line, size_t room) {
    size_t length = 0;
    for (char c; read(0, &c, 1) == 1;) {
        if (length < room - 1) line[length++] = c;
        if (c == '\n') { line[length] = 0; return 1; }
    }
    return 0;
}

static int run(const char *path, int lifeline) {
    signal(SIGPIPE, SIG_IGN);
    struct sigaction end = {.sa_handler = on_signal}; /* no SA_RESTART: waiting has to end */
    sigaction(SIGTERM, &end, NULL);
    sigaction(SIGINT, &end, NULL);
    socket_path = path;
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    traffic_init();
    static char line[65536];
    while (read_line(line, sizeof line)) {
        char *answer = NULL;
        size_t size = 0;
        FILE *out = open_memstream(&answer, &size);
        control_line(line, out);
        fclose(out);
        if (started) { /* the socket comes first: who hears that we have started may use it */
            int listener = listen_at(path);
            prctl(PR_SET_TIMERSLACK, 1UL);
            scheduling_name = take_precedence();
            printf("%s", answer);
            fflush(stdout);
            free(answer);
            serve(listener, lifeline);
        }
        if (size && strcmp(answer, "ok\n")) { fprintf(stderr, "%s", answer); return 2; }
        free(answer);
    }
    fprintf(stderr, "stdin ended before \"start\"\n");
    return 2;
}

int main(int argc, char **argv) {
    if (argc >= 3 && !strcmp(argv[1], "run")) return run(argv[2], argc > 3 && !strcmp(argv[3], "--lifeline"));
    if (argc >= 7 && !strcmp(argv[1], "enter")) return enter(argc, argv);
    fprintf(stderr, "usage: wan run SOCKET [--lifeline] | wan enter PID FD USERNS -- COMMAND ...\n");
    return 2;
}
