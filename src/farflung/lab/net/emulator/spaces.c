/* Network namespaces: made, given a TUN and addresses, entered, and emptied at the end. */
#define _GNU_SOURCE
#include "wan.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <net/route.h>
#include <netinet/in.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef TUN_F_USO4
#define TUN_F_USO4 0x20
#define TUN_F_USO6 0x40
#endif

int in_user_namespace;

static void fail(const char *what) {
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

static int write_file(const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0) return -1;
    ssize_t wrote = write(fd, text, strlen(text));
    int error = errno;
    close(fd);
    errno = error;
    return wrote < 0 ? -1 : 0;
}

/* Without the right to make network namespaces, a user namespace of our own gives it. */
static void new_network(void) {
    if (!unshare(CLONE_NEWNET)) return;
    if (errno != EPERM || in_user_namespace) fail("network namespace");
    char uid[64], gid[64];
    snprintf(uid, sizeof uid, "%u %u 1", geteuid(), geteuid()); /* programs inside stay who they are */
    snprintf(gid, sizeof gid, "%u %u 1", getegid(), getegid());
    if (unshare(CLONE_NEWUSER)) fail("user namespace");
    if (write_file("/proc/self/setgroups", "deny") || write_file("/proc/self/uid_map", uid) || write_file("/proc/self/gid_map", gid))
        fail("user namespace");
    in_user_namespace = 1;
    if (unshare(CLONE_NEWNET)) fail("network namespace");
}

static void set_address(int fd, struct ifreq *request, unsigned long which, uint32_t address) {
    struct sockaddr_in *in = (void *)&request->ifr_addr;
    memset(in, 0, sizeof *in);
    in->sin_family = AF_INET;
    in->sin_addr.s_addr = htonl(address);
    if (ioctl(fd, which, request)) fail("address of " INTERFACE);
}

static void bring_up(int fd, const char *name) {
    struct ifreq request = {0};
    snprintf(request.ifr_name, IFNAMSIZ, "%s", name);
    if (ioctl(fd, SIOCGIFFLAGS, &request)) fail(name);
    request.ifr_flags |= IFF_UP | IFF_RUNNING;
    if (ioctl(fd, SIOCSIFFLAGS, &request)) fail(name);
}

static void configure(const struct node *node, int mtu) {
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0) fail("socket");
    bring_up(fd, "lo");
    struct ifreq request = {0};
    snprintf(request.ifr_name, IFNAMSIZ, "%s", INTERFACE);
    set_address(fd, &request, SIOCSIFADDR, node->inner);
    set_address(fd, &request, SIOCSIFNETMASK, node->nat ? 0xffffff00u : 0xffff0000u);
    request.ifr_mtu = mtu;
    if (ioctl(fd, SIOCSIFMTU, &request)) fail("MTU of " INTERFACE);
    request.ifr_qlen = 10000; /* the queues that count are ours; in a user namespace the kernel's default has to do */
    ioctl(fd, SIOCSIFTXQLEN, &request);
    bring_up(fd, INTERFACE);
    struct rtentry route = {.rt_flags = RTF_UP, .rt_dev = INTERFACE};
    route.rt_dst.sa_family = route.rt_genmask.sa_family = route.rt_gateway.sa_family = AF_INET;
    if (ioctl(fd, SIOCADDRT, &route)) fail("route over " INTERFACE);
    close(fd);
}

void set_offload(const struct node *node) {
    unsigned flags = TUN_F_CSUM;
    if (node->offload) {
        flags |= TUN_F_TSO4 | TUN_F_TSO6;
        if (!ioctl(node->tun, TUNSETOFFLOAD, flags | TUN_F_USO4 | TUN_F_USO6)) return;
    }
    if (ioctl(node->tun, TUNSETOFFLOAD, flags)) perror("offload of " INTERFACE);
}

void open_space(struct node *node, int mtu, const struct sysctl *sysctls, int count, FILE *complaints) {
    new_network();
    node->space = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    struct stat stat;
    if (node->space < 0 || fstat(node->space, &stat)) fail("network namespace");
    node->space_device = stat.st_dev;
    node->space_inode = stat.st_ino;
    node->tun = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (node->tun < 0) fail("/dev/net/tun");
    struct ifreq request = {0};
    snprintf(request.ifr_name, IFNAMSIZ, "%s", INTERFACE);
    request.ifr_flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR;
    if (ioctl(node->tun, TUNSETIFF, &request)) fail("/dev/net/tun");
    write_file("/proc/sys/net/ipv6/conf/" INTERFACE "/disable_ipv6", "1"); /* the network is IPv4; no noise from the other */
    char group[64];
    snprintf(group, sizeof group, "%u %u", getegid(), getegid()); /* whoever made the lab may ping in it */
    write_file("/proc/sys/net/ipv4/ping_group_range", group);
    int header = OFFLOAD_HEADER;
    ioctl(node->tun, TUNSETVNETHDRSZ, &header);
    for (int i = 0; i < count; i++) {
        char path[200] = "/proc/sys/";
        snprintf(path + 10, sizeof path - 10, "%s", sysctls[i].key);
        for (char *c = path + 10; *c; c++) if (*c == '.') *c = '/';
        if (write_file(path, sysctls[i].value) && complaints)
            fprintf(complaints, "%s = %s: %s\n", sysctls[i].key, sysctls[i].value, strerror(errno));
    }
    configure(node, mtu);
    set_offload(node);
}

static int is_ours(const struct stat *stat) {
    for (int i = 0; i < node_count; i++)
        if (nodes[i].space_inode == stat->st_ino && nodes[i].space_device == stat->st_dev) return 1;
    return 0;
}

/* Until a look around finds nobody: what was started during one dies in the next. */
void kill_inside(void) {
    for (int round = 0, found = 1; found && round < 50; round++) {
        found = 0;
        DIR *proc = opendir("/proc");
        if (!proc) return;
        for (struct dirent *entry; (entry = readdir(proc));) {
            int pid = atoi(entry->d_name);
            char path[64];
            struct stat stat_;
            if (pid <= 0 || pid == getpid()) continue;
            snprintf(path, sizeof path, "/proc/%d/ns/net", pid);
            if (!stat(path, &stat_) && is_ours(&stat_) && !kill(pid, SIGKILL)) found = 1;
        }
        closedir(proc);
        if (found) usleep(10000);
    }
}

/* wan enter PID FD USERNS -- COMMAND ... */
int enter(int argc, char **argv) {
    (void)argc;
    char path[64];
    int user = -1;
    if (atoi(argv[4])) {
        snprintf(path, sizeof path, "/proc/%d/ns/user", atoi(argv[2]));
        if ((user = open(path, O_RDONLY | O_CLOEXEC)) < 0) fail("the lab's user namespace");
    }
    snprintf(path, sizeof path, "/proc/%d/fd/%d", atoi(argv[2]), atoi(argv[3]));
    int network = open(path, O_RDONLY | O_CLOEXEC);
    if (network < 0) fail("the node's network namespace");
    if (user >= 0 && setns(user, CLONE_NEWUSER)) fail("the lab's user namespace");
    if (setns(network, CLONE_NEWNET)) fail("the node's network namespace");
    execvp(argv[6], argv + 6);
    fprintf(stderr, "%s: %s\n", argv[6], strerror(errno));
    return errno == ENOENT ? 127 : 126;
}
