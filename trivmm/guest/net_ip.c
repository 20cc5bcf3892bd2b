/* As much of ARP, IPv4, ICMP and UDP as it takes to be pinged, and to ask a server that echoes: a datagram, its answer
 * checked byte for byte, the next one. One that is lost is asked for again. */
#include "net.h"

#define ARP 0x0806
#define IPV4 0x0800
#define ICMP 1
#define UDP 17
#define OUR_PORT 4242
#define AGAIN_MS 200
#define DATA 512

static uint8_t gateway_mac[6];
static int gateway_known;
static uint32_t asked; /* number of the datagram that is under way */
static uint64_t asked_at;

uint64_t net_echoed, net_pinged;

static uint32_t sum(const uint8_t *data, uint32_t length, uint32_t before)
{
    for (uint32_t i = 0; i + 1 < length; i += 2)
        before += get16(data + i);
    if (length & 1)
        before += (uint32_t)data[length - 1] << 8;
    while (before >> 16)
        before = (before & 0xffff) + (before >> 16);
    return before;
}

static uint8_t *ethernet(uint8_t *frame, const uint8_t *to, uint32_t type)
{
    copy_bytes(frame, to, 6);
    copy_bytes(frame + 6, net_mac, 6);
    put16(frame + 12, type);
    return frame + 14;
}

static void send_arp(uint32_t operation, const uint8_t *to, uint32_t address)
{
    static const uint8_t everybody[6] = {255, 255, 255, 255, 255, 255}, nobody[6];
    uint8_t *frame = net_frame();
    if (!frame)
        return;
    uint8_t *arp = ethernet(frame, to ? to : everybody, ARP);
    put16(arp, 1);
    put16(arp + 2, IPV4);
    arp[4] = 6;
    arp[5] = 4;
    put16(arp + 6, operation);
    copy_bytes(arp + 8, net_mac, 6);
    put32(arp + 14, net_ip);
    copy_bytes(arp + 18, to ? to : nobody, 6);
    put32(arp + 24, address);
    for (uint32_t i = 42; i < 60; i++)
        frame[i] = 0;
    net_send(60);
}

/* An IP packet around what is at frame + 34. */
static void send_ip(uint8_t *frame, const uint8_t *mac, uint32_t address, uint32_t protocol, uint32_t length)
{
    uint8_t *ip = ethernet(frame, mac, IPV4);
    put16(ip, 0x4500);
    put16(ip + 2, 20 + length);
    put32(ip + 4, 0);
    ip[8] = 64;
    ip[9] = (uint8_t)protocol;
    put16(ip + 10, 0);
    put32(ip + 12, net_ip);
    put32(ip + 16, address);
    put16(ip + 10, ~sum(ip, 20, 0) & 0xffff);
    net_send(34 + length);
}

static uint8_t datum(uint32_t number, uint32_t at)
{
    return (uint8_t)(number * 31 + at * 7 + (at >> 8));
}

static void ask(void)
{
    uint8_t *frame = net_frame();
    if (!frame)
        return;
    uint8_t *udp = frame + 34;
    put16(udp, OUR_PORT);
    put16(udp + 2, net_port);
    put16(udp + 4, 8 + 4 + DATA);
    put16(udp + 6, 0);
    put32(udp + 8, asked);
    for (uint32_t i = 0; i < DATA; i++)
        udp[12 + i] = datum(asked, i);
    uint8_t pseudo[12];
    put32(pseudo, net_ip);
    put32(pseudo + 4, net_gateway);
    put16(pseudo + 8, UDP);
    put16(pseudo + 10, 8 + 4 + DATA);
    uint32_t checksum = ~sum(udp, 8 + 4 + DATA, sum(pseudo, 12, 0)) & 0xffff;
    put16(udp + 6, checksum ? checksum : 0xffff);
    send_ip(frame, gateway_mac, net_gateway, UDP, 8 + 4 + DATA);
}

void ip_step(uint64_t now)
{
    if (!net_gateway || (asked_at && now - asked_at < milliseconds(AGAIN_MS)))
        return;
    asked_at = now;
    if (!gateway_known)
        send_arp(1, NULL, net_gateway);
    else if (net_port)
        ask();
}

static void arp_received(const uint8_t *arp, uint32_t length)
{
    if (length < 28 || get32(arp + 24) != net_ip)
        return;
    uint32_t from = get32(arp + 14);
    if (from == net_gateway && !gateway_known) {
        copy_bytes(gateway_mac, arp + 8, 6);
        gateway_known = 1;
        asked_at = 0;
    }
    if (get16(arp + 6) == 1)
        send_arp(2, arp + 8, from);
}

static void udp_received(const uint8_t *udp, uint32_t length)
{
    if (length < 12 || get16(udp) != net_port || get16(udp + 2) != OUR_PORT || get32(udp + 8) != asked)
        return;
    uint32_t wrong = get16(udp + 4) == 8 + 4 + DATA && length >= 8 + 4 + DATA ? 0 : 1;
    for (uint32_t i = 0; !wrong && i < DATA; i++)
        wrong = udp[12 + i] != datum(asked, i);
    if (wrong) {
        device_error("LOST datagram", asked, DATA, length);
        return;
    }
    net_echoed++;
    asked++;
    asked_at = 0;
}

static void icmp_received(const uint8_t *from_mac, uint32_t from, const uint8_t *icmp, uint32_t length)
{
    uint8_t *frame = length >= 8 && length < 1500 && icmp[0] == 8 ? net_frame() : NULL;
    if (!frame)
        return;
    copy_bytes(frame + 34, icmp, length);
    frame[34] = 0;
    put16(frame + 36, 0);
    put16(frame + 36, ~sum(frame + 34, length, 0) & 0xffff);
    net_pinged++;
    send_ip(frame, from_mac, from, ICMP, length);
}

void ip_received(const uint8_t *frame, uint32_t length)
{
    if (!net_ip || length < 34)
        return;
    if (get16(frame + 12) == ARP) {
        arp_received(frame + 14, length - 14);
        return;
    }
    const uint8_t *ip = frame + 14;
    uint32_t whole = get16(ip + 2);
    if (get16(frame + 12) != IPV4 || ip[0] != 0x45 || whole < 20 || whole > length - 14 || get32(ip + 16) != net_ip)
        return;
    if (ip[9] == UDP)
        udp_received(ip + 20, whole - 20);
    else if (ip[9] == ICMP)
        icmp_received(frame + 6, get32(ip + 12), ip + 20, whole - 20);
}
