/* Frames between the socket and RAM: one thread receives them, another lands them, so that a destination receives a frame
 * while it lands the one before.
 *
 * The landing thread is made with the first frame that waits for it and joined before tv_pages_receive() returns: none
 * outlives a call. What it does for a frame is bounded (512 KiB are checked and copied), and it waits for nothing but
 * more to do or the end, both of which the receiving thread tells it: that one is its kicker.
 *
 * Frames land in the order in which they came. One is received in place only when none waits to land: what is in RAM
 * already and what is on its way there can't overtake each other, whatever a peer sends.
 *
 * A frame's CRC may be looked at when later ones have been received: it ends the call with BAD all the same, and
 * nothing is acknowledged before the call has ended well with all frames landed.
 */
#ifndef TV_PAGES_INBOX_H
#define TV_PAGES_INBOX_H
#include "pages_land.h"

int tv_inbox_room(struct tv_inbox *inbox, struct tv_entry **entry);
int tv_inbox_push(struct tv_inbox *inbox, struct tv_landing *landing, struct tv_fault *fault);
int tv_inbox_waits(struct tv_inbox *inbox);
int tv_inbox_drain(struct tv_inbox *inbox);
int tv_inbox_alarm(const struct tv_inbox *inbox);
int tv_inbox_end(struct tv_inbox *inbox, int drop, struct tv_fault *fault);

#endif
