#!/bin/sh
# Loads the steerd table into the kernel, or takes it away again. The running daemon does the same by itself; this is
# for having it without the daemon, for looking, and for cleaning up.
#
# The table comes from steerd.nft beside this script and nowhere else. Its placeholders are filled in here exactly as
# `steerd` does it; the sets (endpoints, aliases, targets) stay empty until the daemon fills them.
#
# The sysctls that late steering needs come from the list `sysctls` beside this script. What they were before is kept in
# DIR/sysctls, one line each: NAME, the value before steerd's first change, the value that steerd has set. Values that
# are still steerd's are put back by --uninstall. steerd/kernel/sysctls.py does the same with the same file.
set -eu

usage() {
	cat <<'USAGE'
usage: install.sh [ACTION] [OPTION...]

  (no action)        load the table; loading it again changes rules only and keeps sets, counters and chain admit;
                     set the sysctls that late steering needs
  --check            say whether the kernel would take it, and which sysctls differ; changes nothing
  --print            print what would be loaded; changes nothing
  --status           say what is loaded, whether workers listen, which sysctls differ, and which firewall would drop
                     what is steered, with the rule to add; changes nothing; exit status 1 if something is amiss
  --uninstall        remove the table whole; set the sysctls back

  --mark-bits L-H    the bits of the packet mark that are ours (8-31); the same as gateway.mark_bits
  --queues N         workers, one queue each (1); the same as gateway.workers
  --first-queue N    number of the first queue (21300); the same as gateway.first_queue
  --set NAME=VALUE   another placeholder of steerd.nft, such as SOURCE_RATE=5000
  --run-dir DIR      where the old values of sysctls are kept (/run/steerd); the same as gateway.run_dir; each network
                     namespace needs its own
  --no-sysctl        leave the sysctls as they are: enough if no service reads payloads
  --native, --fallback
                     with the kernel's `queue` statement, or with chains that the daemon fills; found out by asking the
                     kernel
USAGE
}

die() {
	echo "install.sh: $*" >&2
	exit 1
}

# nft lives in sbin, which an ordinary user's path may not name.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
here=$(cd "$(dirname "$0")" && pwd)
template=$here/steerd.nft
action=install low=8 high=31 queues=1 first_queue=21300 queueing=ask run_dir=/run/steerd sysctls=yes overrides=

# integer NAME VALUE LOWEST HIGHEST: a whole number in a range, or the end.
integer() {
	# The shell would take a number with a leading 0 for an octal one, and stumble over more digits than it can count.
	case $2 in '' | *[!0-9]* | 0?* | ???????????*) die "$1 must be a whole number, not '$2'" ;; esac
	{ [ "$2" -ge "$3" ] && [ "$2" -le "$4" ]; } || die "$1 must be $3 to $4, not $2"
}

while [ $# -gt 0 ]; do
	case $1 in
	--check | --print | --status | --uninstall) action=${1#--} ;;
	--native | --fallback) queueing=${1#--} ;;
	--no-sysctl) sysctls=no ;;
	--mark-bits | --queues | --first-queue | --set | --run-dir)
		[ $# -ge 2 ] || die "$1 needs a value"
		case $1 in
		--mark-bits) low=${2%-*} high=${2#*-} ;;
		--queues) queues=$2 ;;
		--first-queue) first_queue=$2 ;;
		--run-dir) run_dir=$2 ;;
		--set)
			sed -n 's/^#! __\([A-Z0-9_]*\)__ *[0-9][0-9]* .*/\1/p' "$template" | grep -Fxq -e "${2%%=*}" ||
				die "steerd.nft has no number called ${2%%=*}"
			integer "${2%%=*}" "${2#*=}" 1 4294967295
			overrides="$2 $overrides" # the last one wins: sed replaces what the first has left
			;;
		esac
		shift
		;;
	-h | --help) usage && exit 0 ;;
	*) usage >&2 && die "unknown argument: $1" ;;
	esac
	shift
done

integer "--mark-bits (low end)" "$low" 0 31
integer "--mark-bits (high end)" "$high" "$low" 31
[ $((high - low)) -ge 19 ] || die "--mark-bits must be at least 20 bits wide, not $((high - low + 1))"
integer --queues "$queues" 1 64
integer --first-queue "$first_queue" 0 $((65536 - queues))
case $run_dir in /*) ;; *) die "--run-dir must be an absolute path, not '$run_dir'" ;; esac
saved=$run_dir/sysctls

hex() { printf '0x%08x' "$1"; }
mask=$((((1 << (high - low + 1)) - 1) << low))
clear=$((~mask & 0xffffffff))
seed=0x5354

# queue_rules FIELDS: hand a packet to a worker, chosen by a hash of these fields (see _queue_rules in ruleset.py).
queue_rules() {
	if [ "$queueing" = native ]; then
		printf "queue to jhash %s mod %d seed $seed offset %d\n" "$1" "$queues" "$first_queue"
		return
	fi
	jumps=
	for n in $(seq 0 $((queues - 1))); do jumps="$jumps${jumps:+, }$n : jump worker$n"; done
	printf 'jhash %s mod %d seed %s vmap { %s }\n\t\tdrop\n' "$1" "$queues" "$seed" "$jumps"
}

# worker_chains: for the daemon to fill, which keep what it has put there; until then what comes to them is dropped.
worker_chains() {
	[ "$queueing" = fallback ] || return 0
	for n in $(seq 0 $((queues - 1))); do
		[ "$n" -eq 0 ] || printf '\t'
		printf 'chain worker%d { comment "hands over to a worker; filled by the daemon"; }\n' "$n"
	done
}

# sed_value TEXT: a text as the right side of sed's s///, line ends kept.
sed_value() {
	printf '%s' "$1" | sed -e 's/[\\&/]/\\&/g' -e '$!s/$/\\/'
}

render() {
	set -- \
		-e "s/__MASK__/$(hex $mask)/g" -e "s/__CLEAR__/$(hex $clear)/g" \
		-e "s/__RESET__/$(hex $((1 << low)))/g" -e "s/__PASS__/$(hex $((2 << low)))/g" \
		-e "s/__OURS__/$(hex $((3 << low)))/g" -e "s/__ASK__/$(hex $((4 << low)))/g" \
		-e "s/__KEEP__/$(hex $((5 << low)))/g" \
		-e "s/__QUEUE4__/$(sed_value "$(queue_rules 'ip saddr . th sport')")/" \
		-e "s/__QUEUE6__/$(sed_value "$(queue_rules 'ip6 saddr . th sport')")/" \
		-e "s/__WORKERS__/$(sed_value "$(worker_chains)")/"
	for pair in $overrides; do
		set -- "$@" -e "s/__${pair%%=*}__/${pair#*=}/g"
	done
	# What nobody has set has its default in the list on top of the template.
	defaults=$(sed -n 's/^#! \(__[A-Z0-9_]*__\) *\([0-9][0-9]*\) .*/s,\1,\2,g/p' "$template")
	sed -e '/^#/b' "$@" -e "$defaults" "$template"
}

kernel_has_queue() {
	echo 'table inet steerd_probe { chain probe { queue num 0 ; } ; }' | nft --check -f - 2>/dev/null
}

sysctl_file() { echo "/proc/sys/$(echo "$1" | tr . /)"; }
sysctl_now() { cat "$(sysctl_file "$1")" 2>/dev/null || echo missing; }
sysctl_set() { echo "$2" 2>/dev/null >"$(sysctl_file "$1")" || die "sysctl $1 cannot be set to $2"; }

# sysctl_fits NOW CONDITION VALUE: whether a value is as the list wants it.
sysctl_fits() {
	[ "$1" != missing ] || return 1
	case $2 in
	is) [ "$1" -eq "$3" ] ;;
	at-least) [ "$1" -ge "$3" ] ;;
	at-least-or-0) [ "$1" -eq 0 ] || [ "$1" -ge "$3" ] ;;
	*) die "$here/sysctls: '$2' is no condition" ;;
	esac
}

# Say what is not as the list wants it, and why it should be; end if it must be so and cannot.
report_sysctls() {
	while read -r name need condition value reason; do
		case $name in '#'* | '') continue ;; esac
		now=$(sysctl_now "$name")
		! sysctl_fits "$now" "$condition" "$value" || continue
		case $condition in is) want=$value ;; *) want="at least $value" ;; esac
		if [ -w "$(sysctl_file "$name")" ]; then
			echo "sysctl $name is $now, $need be $want: $reason"
		else
			said="sysctl $name is $now, $need be $want, and cannot be set here: $reason"
			[ "$need" = should ] || die "$said"
			echo "$said"
		fi
	done <"$here/sysctls"
}

# One at a time, the daemon included: two that save and set in turn would take each other's value for the old one.
lock_sysctls() {
	mkdir -p "$run_dir"
	exec 9<"$run_dir"
	flock 9
	[ ! -e "$saved" ] || ! grep -vEq '^net\.[a-z0-9_.]+ [0-9]+ [0-9]+$' "$saved" ||
		die "$saved must have lines of a name and two numbers: set the sysctls back by hand and remove it"
}

# save_sysctl NAME NOW VALUE: the value before the first change stays, whoever has changed it since.
save_sysctl() {
	first=$(sed -n "s/^$1 \([0-9]*\) .*/\1/p" "$saved")
	rm -f "$saved.new"
	{ sed "/^$1 /d" "$saved" && echo "$1 ${first:-$2} $3"; } | new_file "$saved.new"
	mv "$saved.new" "$saved"
}

# new_file PATH: what is read, in a file that was not there, nor a link: DIR may be another user's.
new_file() (
	set -C
	cat >"$1"
)

set_sysctls() {
	lock_sysctls
	while read -r name _ condition value _; do
		case $name in '#'* | '') continue ;; esac
		now=$(sysctl_now "$name")
		! sysctl_fits "$now" "$condition" "$value" || continue
		[ -w "$(sysctl_file "$name")" ] || continue
		[ -e "$saved" ] || new_file "$saved" </dev/null
		save_sysctl "$name" "$now" "$value"
		sysctl_set "$name" "$value"
		echo "sysctl $name is changed from $now to $value"
	done <"$here/sysctls"
}

restore_sysctls() {
	[ ! -d "$run_dir" ] || lock_sysctls
	[ -e "$saved" ] || return 0
	while read -r name first ours; do
		now=$(sysctl_now "$name")
		if [ "$now" = "$ours" ]; then
			sysctl_set "$name" "$first"
			echo "sysctl $name is changed from $ours to $first"
		else
			echo "sysctl $name is $now, not $ours as steerd had set it, and is left alone"
		fi
	done <"$saved"
	rm "$saved"
}

# firewall_drops HOOK: the base chains of others in a hook that drop a new connection whose address was translated, one
# line each: FAMILY TABLE CHAIN HAS-UFW LATE. A firewall that is not told of steerd's decision sees nothing but a
# connection to the alias and its port. LATE: what late steering opens is dropped, too, though it comes from lo.
# steerd/kernel/firewalls.py does the same for `steerd check --live`.
#
# Chains are followed as the kernel does, as far as that can be said of any such connection: it is new, and in the hook
# input it is for a local address. A rule with any other condition is taken not to match, but
# for those that only lead on (jump, goto) by interface or protocol. So a rule against single ports or addresses is not
# found; who wrote it must know whether the ports of aliases are meant.
firewall_drops() {
	nft -t list ruleset 2>/dev/null | awk -v hook="$1" '
	function strip(rule) {
		sub(/ *# handle [0-9]+$/, "", rule)
		sub(/ comment "[^"]*"$/, "", rule)
		gsub(/counter packets [0-9]+ bytes [0-9]+ ?/, "", rule)
		gsub(/counter name "[^"]*" ?/, "", rule)
		gsub(/log( prefix "[^"]*")?( level [a-z]+)?( flags [a-z ]+)? /, "", rule)
		return rule
	}
	# What is known of every condition: 1 holds, 0 does not, -1 who knows.
	function holds(conditions) {
		if (conditions == "" || conditions == "ct state new") return 1
		if (conditions ~ /^ct status (== )?dnat$/) return 1
		if (conditions ~ /^ct (state|status) [a-z, {}]*new/ ) return 1
		if (conditions == "fib daddr type local") return hook == "input"
		if (conditions ~ /^ct state/) return 0
		if (conditions ~ /^iif(name)? (!= )?"?lo"?$/) return (conditions ~ /!=/) != lo
		if (conditions ~ /^iif(name)? "?lo"?( |$)/) return lo ? -1 : 0
		if (conditions ~ /^iif(name)? "?[^"{!]*"?( |$)/) return lo ? 0 : -1
		return -1
	}
	function judge(chain, depth,    n, i, rule, verdict, conditions, known, there) {
		if (depth > 16) return ""
		n = length_of[chain]
		for (i = 1; i <= n; i++) {
			rule = strip(rules[chain, i])
			if (rule ~ /ct status [a-z,{} ]*dnat.* accept$/ && rule !~ /!=/) return "accept"
			if (!match(rule, /(accept|drop|reject.*|return|(jump|goto) [^ ]+)$/)) continue
			verdict = substr(rule, RSTART)
			conditions = substr(rule, 1, RSTART - 1)
			sub(/ +$/, "", conditions)
			known = holds(conditions)
			if (verdict ~ /^(jump|goto) /) {
				if (known == 0 || (known == -1 && conditions !~ /^(iif|meta (iif|l4proto|nfproto)|ip6? protocol|tcp flags)/)) continue
				there = judge(prefix SUBSEP substr(verdict, 6), depth + 1)
				if (there == "drop" || (there == "accept" && known == 1)) return there
				if (verdict ~ /^goto/ && known == 1) return ""
			} else if (known == 1) {
				if (verdict ~ /^(drop|reject)/) return "drop"
				return verdict == "accept" ? "accept" : ""
			}
		}
		return ""
	}
	$1 == "table" { family = $2; table = $3; next }
	$1 == "chain" && $3 == "{" { chain = family SUBSEP table SUBSEP $2; if ($2 ~ /^ufw6?-before-input$/) ufw[family, table] = 1; next }
	/^\t(\}|[a-z])/ { chain = "" }
	chain == "" { next }
	/^\t\ttype .* hook / {
		if ($0 ~ ("hook " hook " ") && family ~ /^(ip|ip6|inet)$/ && !(family == "inet" && table == "steerd")) {
			base[++bases] = chain
			policy[chain] = ($0 ~ /policy drop/) ? "drop" : ""
		}
		next
	}
	/^\t\tcomment "/ { next }
	/^\t\t\t/ { rules[chain, length_of[chain]] = rules[chain, length_of[chain]] $0; next }
	/^\t\t[^ \t}]/ { sub(/^\t\t/, ""); rules[chain, ++length_of[chain]] = $0 }
	END {
		for (b = 1; b <= bases; b++) {
			split(base[b], part, SUBSEP)
			prefix = part[1] SUBSEP part[2]
			for (lo = 0; lo <= 1; lo++) {
				fate[lo] = judge(base[b], 0)
				if (fate[lo] == "") fate[lo] = policy[base[b]]
			}
			if (fate[0] == "drop") print part[1], part[2], part[3], ((part[1], part[2]) in ufw) ? "ufw" : "-", (fate[1] == "drop") ? "late" : "-"
		}
	}'
}

# rule_to_add FAMILY TABLE CHAIN HAS-UFW: in the words of who keeps that firewall.
rule_to_add() {
	case $1 in ip6) six=6 ;; *) six= ;; esac
	if [ "$4" = ufw ]; then
		case $3 in FORWARD) way=forward ;; *) way=input ;; esac
		echo "    in /etc/ufw/before$six.rules, before COMMIT, and then \`ufw reload\`:"
		echo "    -A ufw$six-before-$way -m conntrack --ctstate DNAT -j ACCEPT"
	elif [ "$2" = filter ] && [ "$1" != inet ] && { [ "$3" = INPUT ] || [ "$3" = FORWARD ]; }; then
		echo "    ip${six}tables -I $3 -m conntrack --ctstate DNAT -j ACCEPT"
	else
		echo "    nft insert rule $1 $2 $3 ct status dnat accept"
	fi
}

report_firewalls() {
	firewall_drops input | while read -r family table chain ufw late; do
		case $late in
		late) what="all that is steered" ;;
		*) what="what is steered at the SYN or as a datagram (late steering is not affected)" ;;
		esac
		echo "firewall: chain $chain of table $family $table drops $what, which it sees as new connections to an alias; add the rule"
		rule_to_add "$family" "$table" "$chain" "$ufw"
	done
	[ ! -s /proc/net/ip_tables_names ] && [ ! -s /proc/net/ip6_tables_names ] ||
		echo "firewall: there are rules of iptables-legacy, which nft does not show; if they drop in INPUT, add: iptables-legacy -I INPUT -m conntrack --ctstate DNAT -j ACCEPT"
}

note_forwarding() {
	firewall_drops forward | while read -r family table chain ufw _; do
		echo "for targets that are not on this machine (external): chain $chain of table $family $table drops what is forwarded to them; add the rule"
		rule_to_add "$family" "$table" "$chain" "$ufw"
	done
}

report_workers() {
	n=$first_queue
	while [ "$n" -lt $((first_queue + queues)) ]; do
		awk -v n="$n" '$1 == n { found = 1 } END { exit !found }' /proc/net/netfilter/nfnetlink_queue 2>/dev/null ||
			echo "queue $n: no worker listens; new connections wait, and are dropped (does steerd run?)"
		n=$((n + 1))
	done
}

# Each part says nothing where all is well.
status() {
	amiss=
	if nft list chain inet steerd divert >/dev/null 2>&1; then
		echo "table inet steerd is loaded (queue: $queueing)"
		amiss=$(report_workers)
	else
		amiss="table inet steerd is not loaded"
	fi
	[ $sysctls = no ] || amiss="$amiss
$(report_sysctls 2>&1 || :)"
	amiss="$amiss
$(report_firewalls)"
	amiss=$(printf '%s\n' "$amiss" | sed '/^$/d')
	[ -z "$amiss" ] || printf '%s\n' "$amiss"
	note_forwarding
	if [ -e "$saved" ]; then
		while read -r name first ours; do
			echo "sysctl $name was $first before steerd set it to $ours; --uninstall sets it back"
		done <"$saved"
	fi
	[ -z "$amiss" ]
}

command -v nft >/dev/null 2>&1 || die "nft is not installed"
if [ "$queueing" = ask ]; then
	if kernel_has_queue; then queueing=native; else queueing=fallback; fi
fi

case $action in
print) render ;;
check)
	render | nft --check -f -
	[ $sysctls = no ] || report_sysctls
	echo "ok: the kernel takes the table (queue: $queueing)"
	;;
status) status || exit 1 ;;
install)
	if [ $sysctls = yes ]; then
		# A table that the kernel refuses must not have changed anything. Besides, asking has nf_conntrack loaded, before
		# which its sysctls do not exist.
		render | nft --check -f -
		report_sysctls
		set_sysctls
	fi
	render | nft -f -
	echo "table inet steerd is loaded (queue: $queueing, queues $first_queue to $((first_queue + queues - 1)))"
	;;
uninstall)
	for table in steerd steerd_hold; do
		printf 'add table inet %s\ndelete table inet %s\n' $table $table
	done | nft -f -
	[ $sysctls = no ] || restore_sysctls
	echo "table inet steerd is gone"
	;;
esac
