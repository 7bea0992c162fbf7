/* A wide-area network inside one machine. main.c tells how the parts fit together. */
#ifndef FARFLUNG_WAN_H
#define FARFLUNG_WAN_H

#include <stdint.h>
#include <stdio.h>

typedef int64_t ns_t; /* nanoseconds of CLOCK_MONOTONIC */

#define MAX_NODES 1000
#define NONE (-1)
#define OFFLOAD_HEADER 10 /* sizeof(struct virtio_net_hdr): stands before every packet of a TUN */
#define INTERFACE "wan0"

enum distribution { NORMAL, LOGNORMAL, PARETO };
enum nat_kind { NAT_OFF, NAT_FULL_CONE, NAT_CONE, NAT_SYMMETRIC };
struct nat;

struct node {
    char name[64], label[64];
    uint32_t address;           /* host order; what others see */
    uint32_t inner;             /* host order; the node's own address: another one behind NAT */
    struct nat *nat;            /* NULL: none */
    int tun, space;             /* file descriptors: the TUN, the network namespace */
    uint64_t space_device, space_inode;
    double up, down;            /* bytes/s, 0: unlimited */
    double up_queue, down_queue; /* bytes a queue holds */
    ns_t rtt;                   /* access RTT: this node's share of a pair's RTT */
    double jitter_ns, jitter_pct; /* standard deviation of a pair's RTT: absolute, and in % of it */
    double correlation_ns;      /* correlation time of the jitter */
    int distribution, keep_order, cut, offload;
    double loss;                /* probability in one direction between two such nodes */
    double loss_burst;          /* mean packets lost in a row; 1: independent */
    ns_t up_free, down_free;    /* when the link falls idle */
    uint64_t tx_packets, tx_bytes, rx_packets, rx_bytes;
    uint64_t drop_up, drop_down, drop_loss, drop_cut, drop_no_route, drop_nat, drop_write;
    ns_t up_wait_max, down_wait_max;
};

struct pair { /* directed */
    ns_t base, fixed, last;     /* extra RTT; RTT that replaces all (or NONE); last arrival */
    double z; ns_t z_at;        /* the correlated gaussian, and when it was drawn */
    float loss;                 /* on top of the nodes' */
    uint8_t cut, bad;
};

extern struct node nodes[MAX_NODES];
extern int node_count;
extern ns_t slack;              /* a packet due within this time goes out now */

/* main.c */
ns_t now_ns(void);
extern const char *scheduling_name;

/* traffic.c */
void traffic_init(void);
void seed_random(uint64_t seed);
uint64_t random_bits(void);
struct pair *pair_of(int from, int to);
int node_at(uint32_t address);  /* host order; NONE where nobody has it */
void route_to(uint32_t address, int node);
void packet_from(int node, unsigned char *data, int length, ns_t at);
void send_due(void);
ns_t next_due(void);            /* NONE: nothing is under way */
struct lateness { uint64_t packets, sum, max, in_flight; } lateness(void);
void reset_lateness(void);

/* nat.c: both return 0 where the packet has to be dropped */
struct nat *nat_new(enum nat_kind kind, uint32_t inner, uint32_t public);
enum nat_kind nat_kind_of(const struct nat *nat);
int nat_outward(struct nat *nat, unsigned char *data, int length, ns_t at);
int nat_inward(struct nat *nat, unsigned char *data, int length, ns_t at);

/* spaces.c */
struct sysctl { char key[96], value[96]; };
extern int in_user_namespace;
void open_space(struct node *node, int mtu, const struct sysctl *sysctls, int count, FILE *complaints);
void set_offload(const struct node *node);
void kill_inside(void);
int enter(int argc, char **argv);

/* control.c */
extern int started;
void control_line(char *line, FILE *answer);

#endif
